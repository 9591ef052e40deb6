//! Compiles `clutch/**/*.proto` without protoc; the descriptor set serves gRPC reflection. Messages only:
//! what carries them is generated in `runtime`, so that whoever applies entries depends on no transport.

#![expect(clippy::disallowed_methods, reason = "what builds the crate is not in it")]

use std::{env, fs, path::PathBuf};

use prost::Message as _;
use prost_types::FileDescriptorSet;

fn main() {
    let areas = ["types", "session", "registry", "shard", "cdc", "blocks", "state", "admin"];
    let files: Vec<String> = areas.iter().map(|a| format!("clutch/{a}/v1/{a}.proto")).collect();
    println!("cargo:rerun-if-changed=clutch");
    let descriptors = protox::compile(&files, ["."]).unwrap_or_else(|e| panic!("compile protos: {e:?}"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec()).expect("write descriptor set");
    fs::write(out.join("names.rs"), names(&descriptors)).expect("write the operations' names");
    fs::write(out.join("again.rs"), again(&descriptors)).expect("write the messages' names");
    prost_build::Config::new()
        .bytes(["."])
        // Written by hand, so that a block is not copied on its way.
        .extern_path(".clutch.session.v1.Frame", "crate::parts::Frame")
        .extern_path(".clutch.session.v1.Frames", "crate::parts::Frames")
        .compile_fds(descriptors)
        .expect("generate code");
}

/// The names of all operations, as their messages have them, and of each what it is called.
fn names(descriptors: &FileDescriptorSet) -> String {
    let mut text = String::new();
    for (area, request) in [("shard", "ShardRequest"), ("cdc", "CdcRequest"), ("registry", "RegistryRequest")]
    {
        let package = format!("clutch.{area}.v1");
        let file = descriptors.file.iter().find(|file| file.package() == package).expect("the area's file");
        let message = file.message_type.iter().find(|m| m.name() == request).expect("its request");
        let fields = message.field.iter().filter(|field| field.oneof_index.is_some());
        // A field is called as its message, so that the variant is, too.
        let names: Vec<&str> = fields.filter_map(|field| field.type_name().rsplit('.').next()).collect();
        let arms: String = names.iter().map(|name| format!("Self::{name}(_) => {name:?},")).collect();
        text += &format!(
            "impl crate::{area}::{area}_request::Op {{
                /// All operations, as the protocol lists them.
                pub const NAMES: &[&str] = &{names:?};
                /// What it is called.
                pub fn name(&self) -> &'static str {{ match self {{ {arms} }} }}
            }}"
        );
    }
    text
}

/// For the tests: reads and writes any message, by its name.
fn again(descriptors: &FileDescriptorSet) -> String {
    let mut arms = String::new();
    for file in &descriptors.file {
        let (package, path) = (file.package(), file.package().replace('.', "::"));
        for message in file.message_type.iter().map(|message| message.name()) {
            let ours = match (package, message) {
                ("clutch.session.v1", "Frame" | "Frames") => format!("clutch_proto::parts::{message}"),
                _ => format!("clutch_proto::{path}::{message}"),
            };
            arms +=
                &format!("{:?} => Some(read_and_write::<{ours}>(bytes)),", format!("{package}.{message}"));
        }
    }
    format!(
        "/// Reads a message and writes it again; `None` where no message has the name.
        fn again(name: &str, bytes: &[u8]) -> Option<Result<Vec<u8>, DecodeError>> {{
            match name {{ {arms} _ => None }}
        }}"
    )
}
