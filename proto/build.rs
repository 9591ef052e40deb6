//! Compiles `clutch/**/*.proto` without protoc; the descriptor set serves gRPC reflection. Messages only:
//! what carries them is generated in `runtime`, so that whoever applies entries depends on no transport.

#![expect(clippy::disallowed_methods, reason = "what builds the crate is not in it")]

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() {
    let areas = ["types", "session", "registry", "shard", "cdc", "blocks", "state", "admin"];
    let files: Vec<String> = areas.iter().map(|a| format!("clutch/{a}/v1/{a}.proto")).collect();
    println!("cargo:rerun-if-changed=clutch");
    let descriptors = protox::compile(&files, ["."]).unwrap_or_else(|e| panic!("compile protos: {e:?}"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec()).expect("write descriptor set");
    prost_build::Config::new()
        .bytes(["."])
        // Written by hand, so that a block is not copied on its way.
        .extern_path(".clutch.session.v1.Frame", "crate::parts::Frame")
        .extern_path(".clutch.session.v1.Frames", "crate::parts::Frames")
        .compile_fds(descriptors)
        .expect("generate code");
}
