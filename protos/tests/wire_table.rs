//! The compiled descriptors of the CRI and of NRI against the interfaces' published tables, item by
//! item.
//!
//! A table is a text file that is not part of this repository: its path is taken from
//! `HOLDFAST_CRI_WIRE_TABLE` or `HOLDFAST_NRI_WIRE_TABLE`, else it is looked for in
//! `../shared/reference/` beside the workspace. A checkout without it compares the descriptor with the
//! counts and the fingerprint below, which were taken when descriptor and table agreed, so a change of
//! the wire cannot go unnoticed anywhere.
//!
//! Both sides are brought into one shape: a map from a name (`VersionRequest`, `VersionRequest.version`,
//! `RuntimeService/Version`) to what is said about it (`1 string`, …). Comparing maps finds what is
//! wrong, what is missing and what is too much.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::PathBuf};

use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
};

/// An interface that others define.
struct Interface {
    package: &'static str,
    descriptor: &'static [u8],
    /// Where the table is: variable, and file beside the workspace.
    table: (&'static str, &'static str),
    /// For checkouts without the table: rpcs, messages, fields, enums, enum values.
    counts: [usize; 5],
    fingerprint: u64,
}

/// As of Kubernetes 1.37.
const CRI: Interface = Interface {
    package: "runtime.v1",
    descriptor: holdfast_protos::cri::DESCRIPTOR_SET,
    table: ("HOLDFAST_CRI_WIRE_TABLE", "cri-v1-wire.txt"),
    counts: [43, 175, 478, 11, 95],
    fingerprint: 0xa840_5529_545c_347f,
};

const NRI: Interface = Interface {
    package: "nri.pkg.api.v1alpha1",
    descriptor: holdfast_protos::nri::DESCRIPTOR_SET,
    table: ("HOLDFAST_NRI_WIRE_TABLE", "nri-v1alpha1-wire.txt"),
    counts: [21, 84, 248, 10, 99],
    fingerprint: 0xd951_7fd2_3708_951a,
};

type Items = BTreeMap<String, String>;

#[test]
fn the_descriptors_are_the_published_interfaces() {
    for interface in [CRI, NRI] {
        compare(&interface);
    }
}

fn compare(interface: &Interface) {
    let ours = descriptor(interface);
    let path = table_path(interface);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let table = parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let differences = differences(&table, &ours);
            assert!(
                differences.is_empty(),
                "{} differs from {}:\n{differences}",
                interface.package,
                path.display()
            );
            println!("compared {} items with {}", table.len(), path.display());
        }
        Err(error) => eprintln!(
            "NOT compared with the published table ({}: {error}): set {} to its path; the committed \
             fingerprint is checked instead",
            path.display(),
            interface.table.0
        ),
    }
}

#[test]
fn the_descriptors_have_the_committed_fingerprints() {
    for interface in [CRI, NRI] {
        let ours = descriptor(&interface);
        let count = |mark: &str| ours.values().filter(|value| value.starts_with(mark)).count();
        assert_eq!(
            [count("rpc"), count("message"), count("field"), count("enum"), count("value")],
            interface.counts,
            "{}: rpcs, messages, fields, enums, enum values",
            interface.package
        );
        let found = fingerprint(&ours);
        assert_eq!(found, interface.fingerprint, "{}: {found:#x}", interface.package);
    }
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

fn table_path(interface: &Interface) -> PathBuf {
    let (variable, file) = interface.table;
    match env::var_os(variable) {
        Some(path) => path.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference").join(file),
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

/// What was compiled from the `.proto` file.
fn descriptor(interface: &Interface) -> Items {
    let pool = DescriptorPool::decode(interface.descriptor).unwrap();
    let local = |name: &str| local(interface.package, name);
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
        add_message(&mut items, interface.package, &message);
    }
    for item in pool.all_enums() {
        add_enum(&mut items, interface.package, &item);
    }
    items
}

fn add_message(items: &mut Items, package: &str, message: &MessageDescriptor) {
    let owner = local(package, message.full_name());
    items.insert(owner.clone(), "message".into());
    assert_eq!(message.oneofs().count(), 0, "{owner}: the table knows no oneof");
    for field in message.fields() {
        let deprecated = if is_deprecated(&field) { " deprecated" } else { "" };
        items.insert(
            format!("{owner}.{}", field.name()),
            format!("field {} {}{deprecated}", field.number(), type_of(package, &field)),
        );
    }
}

fn add_enum(items: &mut Items, package: &str, item: &EnumDescriptor) {
    let owner = local(package, item.full_name());
    items.insert(owner.clone(), "enum".into());
    for value in item.values() {
        items.insert(format!("{owner}.{}", value.name()), format!("value {}", value.number()));
    }
}

/// The type as the table writes it.
fn type_of(package: &str, field: &FieldDescriptor) -> String {
    let kind = |of: &Kind| kind(package, of);
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

fn kind(package: &str, kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => local(package, message.full_name()),
        Kind::Enum(item) => local(package, item.full_name()),
        scalar => format!("{scalar:?}"),
    }
}

fn is_deprecated(field: &FieldDescriptor) -> bool {
    field.field_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated())
}

/// A name without the package, as the table writes it.
fn local(package: &str, full_name: &str) -> String {
    full_name
        .strip_prefix(package)
        .and_then(|rest| rest.strip_prefix('.'))
        .unwrap_or_else(|| panic!("{full_name} is not in package {package}"))
        .to_owned()
}
