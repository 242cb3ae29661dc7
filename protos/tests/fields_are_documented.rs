//! Every field of every message that configures, asks or answers stands in docs/cri-fields.md, in the
//! section of its message.

use std::{collections::BTreeMap, fs, path::Path};

use prost_reflect::DescriptorPool;

const PACKAGE: &str = "runtime.v1";

/// Sections by the messages that their headings name.
fn sections(text: &str) -> BTreeMap<String, String> {
    let mut sections: BTreeMap<String, String> = BTreeMap::new();
    let mut names: Vec<String> = Vec::new();
    for line in text.lines() {
        if line.starts_with("## ") || line.starts_with("### ") {
            let heading = line.trim_start_matches('#').trim();
            names = heading.split(", ").map(String::from).collect();
        }
        for name in &names {
            let section = sections.entry(name.clone()).or_default();
            section.push_str(line);
            section.push('\n');
        }
    }
    sections
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

#[test]
fn every_field_says_what_becomes_of_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cri-fields.md");
    let text = fs::read_to_string(path).unwrap();
    let sections = sections(&text);
    let pool = DescriptorPool::decode(holdfast_protos::cri::DESCRIPTOR_SET).unwrap();
    let mut missing = Vec::new();
    for message in pool.all_messages().filter(|m| m.package_name() == PACKAGE && !m.is_map_entry())
    {
        let name = message.name();
        // Windows' own; wrappers of a number; usage and metrics, which are figures; and what only
        // carries a list, which the text says of them all.
        let left_out = name.contains("Windows")
            || name.ends_with("Value") && name.contains("Int64")
            || ["Stats", "Usage", "Metric", "Psi", "Attributes"]
                .iter()
                .any(|part| name.contains(part))
                && !name.ends_with("Request")
                && !name.ends_with("Filter")
                && !name.starts_with("Filesystem")
            || name.ends_with("Response")
                && (name.starts_with("List") || name.starts_with("Stream"))
            || name.starts_with("Stream") && name.ends_with("Request");
        if left_out {
            continue;
        }
        for field in message.fields() {
            let said = sections.get(name).is_some_and(|text| has_word(text, field.name()));
            if !said {
                missing.push(format!("{name}.{}", field.name()));
            }
        }
    }
    assert!(missing.is_empty(), "docs/cri-fields.md does not say of: {}", missing.join(", "));
}
