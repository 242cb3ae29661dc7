//! The compiled CRI descriptor against the interface's published table, item by item.
//!
//! The table is a text file that is not part of this repository: its path is taken from
//! `HOLDFAST_CRI_WIRE_TABLE`, else `../shared/reference/cri-v1-wire.txt` beside the workspace. A
//! checkout without it compares the descriptor with the counts and the fingerprint below, which were
//! taken when descriptor and table agreed, so a change of the wire cannot go unnoticed anywhere.
//!
//! Both sides are brought into one shape: a map from a name (`VersionRequest`, `VersionRequest.version`,
//! `RuntimeService/Version`) to what is said about it (`1 string`, …). Comparing maps finds what is
//! wrong, what is missing and what is too much.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::PathBuf};

use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
};

const PACKAGE: &str = "runtime.v1";

/// What the interface of Kubernetes 1.37 has, for checkouts without the table.
const RPCS: usize = 43;
const MESSAGES: usize = 175;
const FIELDS: usize = 478;
const ENUMS: usize = 11;
const VALUES: usize = 95;
const FINGERPRINT: u64 = 0xa840_5529_545c_347f;

type Items = BTreeMap<String, String>;

#[test]
fn the_descriptor_is_the_published_interface() {
    let ours = descriptor();
    let path = table_path();
    match fs::read_to_string(&path) {
        Ok(text) => {
            let table = parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let differences = differences(&table, &ours);
            assert!(
                differences.is_empty(),
                "cri.proto differs from {}:\n{differences}",
                path.display()
            );
            println!("compared {} items with {}", table.len(), path.display());
        }
        Err(error) => eprintln!(
            "NOT compared with the published table ({}: {error}): set HOLDFAST_CRI_WIRE_TABLE to \
             its path; the committed fingerprint is checked instead",
            path.display()
        ),
    }
}

#[test]
fn the_descriptor_has_the_committed_fingerprint() {
    let ours = descriptor();
    let count = |mark: &str| ours.values().filter(|value| value.starts_with(mark)).count();
    assert_eq!(
        [count("rpc"), count("message"), count("field"), count("enum"), count("value")],
        [RPCS, MESSAGES, FIELDS, ENUMS, VALUES],
        "rpcs, messages, fields, enums, enum values"
    );
    assert_eq!(fingerprint(&ours), FINGERPRINT, "{:#x}", fingerprint(&ours));
}

#[test]
fn a_difference_of_every_sort_is_found() {
    let table = "package runtime.v1 syntax proto3\nservice S\n  R (A) -> stream B\nmessage A\n    \
                 1 a string\n    2 b repeated int32\n    3 c map<string,string>\n    4 d string deprecated\n\
                 enum E\n    0 ZERO\n";
    let right = parse(table).unwrap();
    assert_eq!(right.len(), 10, "{right:?}");
    assert_eq!(differences(&right, &right), "");
    for (from, to) in [
        ("-> stream B", "-> B"),
        ("R (A)", "R (B)"),
        ("R (A)", "Q (A)"),
        ("1 a string", "9 a string"),
        ("1 a string", "1 a bytes"),
        ("1 a string", "1 aa string"),
        ("repeated int32", "int32"),
        ("map<string,string>", "repeated string"),
        ("string deprecated", "string"),
        ("0 ZERO", "0 NIL"),
        ("0 ZERO", "1 ZERO"),
        ("    0 ZERO\n", ""),
        ("syntax proto3", "syntax proto2"),
    ] {
        let wrong = parse(&table.replacen(from, to, 1)).unwrap();
        assert_ne!(differences(&right, &wrong), "", "{from} -> {to}");
    }
    assert!(parse("package p syntax proto3\nnonsense here\n").is_err());
    assert!(parse("").is_err());
}

fn table_path() -> PathBuf {
    match env::var_os("HOLDFAST_CRI_WIRE_TABLE") {
        Some(path) => path.into(),
        None => {
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/cri-v1-wire.txt")
        }
    }
}

/// One line per item that differs; empty when all is the same.
fn differences(table: &Items, ours: &Items) -> String {
    let mut text = String::new();
    for (name, wanted) in table {
        match ours.get(name) {
            Some(found) if found == wanted => {}
            Some(found) => writeln!(text, "{name}: is {found:?}, must be {wanted:?}").unwrap(),
            None => writeln!(text, "{name}: missing, must be {wanted:?}").unwrap(),
        }
    }
    for (name, found) in ours {
        if !table.contains_key(name) {
            writeln!(text, "{name}: is {found:?}, but is not in the table").unwrap();
        }
    }
    text
}

/// FNV-1a over every item: stable across compilers, which `std`'s hasher does not promise.
fn fingerprint(items: &Items) -> u64 {
    items
        .iter()
        .flat_map(|(name, value)| format!("{name}={value}\n").into_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// Reads the table.
///
/// # Errors
/// A line that is none of the known forms, named by its number; a name that appears twice.
fn parse(text: &str) -> Result<Items, String> {
    let mut items = Items::new();
    let mut owner = (String::new(), "");
    for (number, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let indented = line.starts_with(' ');
        let (name, value) = match (indented, owner.1, words.as_slice()) {
            (_, _, []) => continue,
            (false, _, ["package", package, "syntax", syntax]) => {
                ("package".into(), format!("{package} {syntax}"))
            }
            (false, _, [kind @ ("service" | "message" | "enum"), name]) => {
                owner = ((*name).to_owned(), kind);
                ((*name).to_owned(), (*kind).to_owned())
            }
            (true, "service", [rpc, input, "->", output @ ..]) => {
                (format!("{}/{rpc}", owner.0), format!("rpc {input} -> {}", output.join(" ")))
            }
            (true, "message", [tag, name, what @ ..]) if !what.is_empty() => {
                (format!("{}.{name}", owner.0), format!("field {tag} {}", what.join(" ")))
            }
            (true, "enum", [tag, name]) => (format!("{}.{name}", owner.0), format!("value {tag}")),
            _ => return Err(format!("line {}: {line:?} is not understood", number + 1)),
        };
        if items.insert(name.clone(), value).is_some() {
            return Err(format!("line {}: {name} appears twice", number + 1));
        }
    }
    if items.contains_key("package") { Ok(items) } else { Err("no package line".into()) }
}

/// What was compiled from `cri.proto`.
fn descriptor() -> Items {
    let pool = DescriptorPool::decode(holdfast_protos::cri::DESCRIPTOR_SET).unwrap();
    let mut items = Items::new();
    for file in pool.files() {
        let syntax = file.file_descriptor_proto().syntax().to_owned();
        items.insert("package".into(), format!("{} {syntax}", file.package_name()));
    }
    for service in pool.services() {
        items.insert(local(service.full_name()), "service".into());
        for method in service.methods() {
            assert!(!method.is_client_streaming(), "{}", method.full_name());
            let stream = if method.is_server_streaming() { "stream " } else { "" };
            items.insert(
                format!("{}/{}", service.name(), method.name()),
                format!(
                    "rpc ({}) -> {stream}{}",
                    local(method.input().full_name()),
                    local(method.output().full_name())
                ),
            );
        }
    }
    for message in pool.all_messages().filter(|message| !message.is_map_entry()) {
        add_message(&mut items, &message);
    }
    for item in pool.all_enums() {
        add_enum(&mut items, &item);
    }
    items
}

fn add_message(items: &mut Items, message: &MessageDescriptor) {
    let owner = local(message.full_name());
    items.insert(owner.clone(), "message".into());
    assert_eq!(message.oneofs().count(), 0, "{owner}: the table knows no oneof");
    for field in message.fields() {
        let deprecated = if is_deprecated(&field) { " deprecated" } else { "" };
        items.insert(
            format!("{owner}.{}", field.name()),
            format!("field {} {}{deprecated}", field.number(), type_of(&field)),
        );
    }
}

fn add_enum(items: &mut Items, item: &EnumDescriptor) {
    let owner = local(item.full_name());
    items.insert(owner.clone(), "enum".into());
    for value in item.values() {
        items.insert(format!("{owner}.{}", value.name()), format!("value {}", value.number()));
    }
}

/// The type as the table writes it.
fn type_of(field: &FieldDescriptor) -> String {
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else { unreachable!("a map is made of entries") };
        return format!(
            "map<{},{}>",
            kind(&entry.map_entry_key_field().kind()),
            kind(&entry.map_entry_value_field().kind())
        );
    }
    match field.cardinality() {
        Cardinality::Repeated => format!("repeated {}", kind(&field.kind())),
        Cardinality::Optional => {
            // Explicit presence ("optional") would be another wire contract.
            let scalar = !matches!(field.kind(), Kind::Message(_));
            assert!(!(scalar && field.supports_presence()), "{}", field.full_name());
            kind(&field.kind())
        }
        Cardinality::Required => unreachable!("proto3 has no required fields"),
    }
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => local(message.full_name()),
        Kind::Enum(item) => local(item.full_name()),
        scalar => format!("{scalar:?}"),
    }
}

fn is_deprecated(field: &FieldDescriptor) -> bool {
    field.field_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated())
}

/// A name without the package, as the table writes it.
fn local(full_name: &str) -> String {
    full_name
        .strip_prefix(PACKAGE)
        .and_then(|rest| rest.strip_prefix('.'))
        .unwrap_or_else(|| panic!("{full_name} is not in package {PACKAGE}"))
        .to_owned()
}
