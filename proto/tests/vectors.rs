//! The schema, kept, and bytes of every message. `docs/formats/golden/schema.txt` has a line for each field and each value of
//! an enum: name, number and type stay as they are. `messages.txt` has one line for each message, with all of its fields set,
//! and one for each of what it can be: what an earlier build wrote is read and written again as the same bytes.
//!
//! A new field or message adds lines (`UPDATE_VECTORS=1`); no line is ever changed or removed.

#![expect(clippy::disallowed_methods, reason = "kept bytes are files, and no part of the protocol")]

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use clutch_proto::DESCRIPTORS;
use prost::{DecodeError, Message, encoding};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

include!(concat!(env!("OUT_DIR"), "/again.rs"));

/// A message in a message in a message: deeper ones are left empty.
const DEPTH_MAX: usize = 6;

/// Reads a message and writes it again.
fn read_and_write<M: Message + Default>(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    Ok(M::decode(bytes)?.encode_to_vec())
}

/// All messages by their names, as fields call them.
struct Messages(BTreeMap<String, DescriptorProto>);

impl Messages {
    fn load() -> Messages {
        let files = FileDescriptorSet::decode(DESCRIPTORS).expect("descriptors").file;
        let named = files.into_iter().flat_map(|file| {
            let package = file.package().to_owned();
            file.message_type.into_iter().map(move |m| (format!(".{package}.{}", m.name()), m))
        });
        Messages(named.collect())
    }

    /// A message with all of its fields; of those that exclude each other only `chosen`, or the first.
    fn sample(&self, name: &str, chosen: Option<&str>, depth: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Some(message) = self.0.get(name) else { panic!("{name} is no message") };
        if depth == 0 {
            return bytes;
        }
        let mut fields: Vec<&FieldDescriptorProto> = message.field.iter().collect();
        fields.sort_by_key(|field| field.number());
        let mut taken = Vec::new();
        for field in fields {
            let is_alone = !choices(message).contains(&field.name());
            let is_chosen = chosen.is_none_or(|chosen| chosen == field.name());
            if !is_alone && (!is_chosen || taken.contains(&field.oneof_index())) {
                continue;
            }
            if !is_alone {
                taken.push(field.oneof_index());
            }
            // Nobody reads what fills a message up.
            if name == ".clutch.session.v1.Frames" && field.name() == "padding" {
                continue;
            }
            self.put(field, depth, &mut bytes);
        }
        bytes
    }

    fn put(&self, field: &FieldDescriptorProto, depth: usize, bytes: &mut Vec<u8>) {
        let number = field.number() as u32;
        // More than 32 bits where they fit: a narrower type would lose some.
        let large = match field.r#type() {
            Type::Uint64 => u64::from(number) + (300 << 32),
            _ => u64::from(number) + 300,
        };
        let values: &[u64] = match field.label() {
            Label::Repeated => &[large, 1],
            Label::Optional | Label::Required => &[large],
        };
        match field.r#type() {
            Type::Uint64 => match values {
                [value] => encoding::uint64::encode(number, value, bytes),
                values => encoding::uint64::encode_packed(number, values, bytes),
            },
            Type::Uint32 => {
                let values: Vec<u32> = values.iter().map(|value| *value as u32).collect();
                match values[..] {
                    [value] => encoding::uint32::encode(number, &value, bytes),
                    _ => encoding::uint32::encode_packed(number, &values, bytes),
                }
            }
            Type::Fixed32 => {
                let values: Vec<u32> = values.iter().map(|value| *value as u32).collect();
                match values[..] {
                    [value] => encoding::fixed32::encode(number, &value, bytes),
                    _ => encoding::fixed32::encode_packed(number, &values, bytes),
                }
            }
            Type::Bool => encoding::bool::encode(number, &true, bytes),
            Type::Enum if values.len() > 1 => encoding::int32::encode_packed(number, &[1, 1], bytes),
            Type::Enum => encoding::int32::encode(number, &1, bytes),
            Type::Sint64 => encoding::sint64::encode(number, &-i64::from(number), bytes),
            Type::String => {
                values.iter().for_each(|value| encoding::string::encode(number, &format!("s{value}"), bytes));
            }
            Type::Bytes => {
                let value = |value: &u64| vec![0xff, *value as u8, 0];
                values.iter().for_each(|v| encoding::bytes::encode(number, &value(v), bytes));
            }
            Type::Message => {
                for _ in values {
                    let inner = self.sample(field.type_name(), None, depth - 1);
                    encoding::bytes::encode(number, &inner, bytes);
                }
            }
            other => panic!("{}: a way to write {other:?} is needed here", field.name()),
        }
    }
}

/// The fields of which a message has one.
fn choices(message: &DescriptorProto) -> Vec<&str> {
    let of_one = message.field.iter().filter(|f| f.oneof_index.is_some() && !f.proto3_optional());
    of_one.map(|field| field.name()).collect()
}

/// A line for each field and each value of an enum.
fn schema() -> Vec<String> {
    let files = FileDescriptorSet::decode(DESCRIPTORS).expect("descriptors").file;
    let mut lines = Vec::new();
    for file in &files {
        for message in &file.message_type {
            for field in &message.field {
                let kind = match field.r#type() {
                    Type::Message | Type::Enum => field.type_name()[1..].to_owned(),
                    kind => format!("{kind:?}").to_lowercase(),
                };
                let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
                let name = format!("{}.{}.{}", file.package(), message.name(), field.name());
                lines.push(format!("{name} = {} {repeated}{kind}", field.number()));
            }
        }
        for of in &file.enum_type {
            for value in &of.value {
                lines.push(format!("{}.{}.{} = {}", file.package(), of.name(), value.name(), value.number()));
            }
        }
    }
    lines
}

/// The kept text of a golden file, with what is new added when `UPDATE_VECTORS` is set; else nothing may be new.
fn kept(name: &str, now: &[String]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/golden").join(name);
    let mut kept = match std::fs::read_to_string(&path) {
        // The first lines are still to be written.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        kept => kept.expect("the kept lines"),
    };
    let missing: Vec<&String> = now.iter().filter(|now| !kept.lines().any(|line| line == **now)).collect();
    if std::env::var_os("UPDATE_VECTORS").is_some() {
        for line in &missing {
            let _ = writeln!(kept, "{line}");
        }
        std::fs::write(&path, &kept).expect("writes");
    } else {
        let names: Vec<&str> = missing.iter().filter_map(|line| line.split(' ').next()).collect();
        assert!(
            names.is_empty(),
            "{name} lacks {names:?}: if all that is new is meant, UPDATE_VECTORS=1 adds it"
        );
    }
    kept
}

#[test]
fn fields_and_values_keep_their_numbers_and_types() {
    let now = schema();
    let kept = kept("schema.txt", &now);
    let lost: Vec<&str> = kept.lines().filter(|line| !now.iter().any(|now| now == line)).collect();
    assert!(lost.is_empty(), "these have another number or type, or are gone: {lost:#?}");
}

/// A line for each message and each of its choices.
fn now() -> Vec<String> {
    let messages = Messages::load();
    let mut lines = Vec::new();
    for (name, message) in &messages.0 {
        let chosen = choices(message);
        let each = if chosen.is_empty() { vec![None] } else { chosen.into_iter().map(Some).collect() };
        for chosen in each {
            let hex = messages.sample(name, chosen, DEPTH_MAX).iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            let called = chosen.map(|chosen| format!(".{chosen}")).unwrap_or_default();
            lines.push(format!("{}{called} {hex}", &name[1..]));
        }
    }
    lines
}

#[test]
fn every_message_is_read_and_written_as_its_kept_bytes() {
    let kept = kept("messages.txt", &now());
    for line in kept.lines() {
        let (name, hex) = line.split_once(' ').expect("a name and bytes");
        let bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hexadecimal"))
            .collect();
        // The last part of a name may be a choice.
        let again = again(name, &bytes).or_else(|| again(name.rsplit_once('.')?.0, &bytes));
        let again = again.unwrap_or_else(|| panic!("{name}: no such message any more"));
        assert_eq!(again.unwrap_or_else(|e| panic!("{name}: {e}")), bytes, "{name}");
    }
}
