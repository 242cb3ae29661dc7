//! The conformance kit, run against our shim and three others. What each does not do is listed here and
//! explained in docs/shims.md; a new deviation fails, and so does one that is gone.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    binaries::binaries,
    conformance::{CASES, Subject, judge, table},
    hugetlb::Hugetlb,
};

const OURS: &str = "holdfast";
const RUNC: &str = "runc-v2 1.6";
const OLD: &str = "crate 0.11";
const NEW: &str = "crate 0.12";

/// Shim and case.
const DEVIATIONS: &[(&str, &str)] = &[
    (RUNC, "`start` with BootstrapParams"),
    (RUNC, "Task v3"),
    (RUNC, "Create of an id that is taken: ALREADY_EXISTS"),
    (RUNC, "a root of layers with mapped owners (uidmap, gidmap), for a user namespace"),
    (RUNC, "Sandbox v1: a pod's life by containerd 2.x's calls"),
    (RUNC, "Sandbox v1: namespaces of the node, and a user namespace that is given"),
    (RUNC, "Sandbox v1: `delete` after the shim was killed ends the whole pod"),
    (OLD, "Task v3"),
    (OLD, "a terminal, and its size"),
    (OLD, "Pids"),
    (OLD, "Stats"),
    (OLD, "a root of layers with mapped owners (uidmap, gidmap), for a user namespace"),
    (OLD, "Update"),
    (OLD, "events: create, start, exit, delete, in that order"),
    (OLD, "Sandbox v1: a pod's life by containerd 2.x's calls"),
    (OLD, "Sandbox v1: namespaces of the node, and a user namespace that is given"),
    (OLD, "Sandbox v1: `delete` after the shim was killed ends the whole pod"),
    (NEW, "Task v2"),
    (NEW, "a terminal, and its size"),
    (NEW, "Pids"),
    (NEW, "Stats"),
    (NEW, "a root of layers with mapped owners (uidmap, gidmap), for a user namespace"),
    (NEW, "Update"),
    (NEW, "events: create, start, exit, delete, in that order"),
    (NEW, "Sandbox v1: a pod's life by containerd 2.x's calls"),
    (NEW, "Sandbox v1: namespaces of the node, and a user namespace that is given"),
    (NEW, "Sandbox v1: `delete` after the shim was killed ends the whole pod"),
];

#[tokio::test(flavor = "multi_thread")]
async fn shims_keep_to_the_contract_as_far_as_the_table_says() -> Result<()> {
    // containerd's shim gives no statistics of a container for which a hierarchy appears after its start.
    // Tests of crun mount one: so it is there from the beginning, and stays.
    let _hierarchies = Hugetlb::hold(true)?;
    let shim = binaries()?.shim;
    let subjects = [
        Subject { name: OURS, binary: shim.clone() },
        Subject { name: RUNC, binary: PathBuf::from("/usr/bin/containerd-shim-runc-v2") },
        Subject { name: OLD, binary: shim.with_file_name("holdfast-testshim-old") },
        Subject { name: NEW, binary: shim.with_file_name("holdfast-testshim-new") },
    ];
    let mut outcomes = Vec::new();
    for subject in &subjects {
        outcomes.extend(judge(subject).await.with_context(|| subject.name)?);
    }
    let table = table(&subjects, &outcomes);
    println!("{table}");
    // `make test` prints it at the end.
    fs::write(shim.with_file_name("conformance.md"), &table)?;
    let mut seen = BTreeSet::new();
    for outcome in &outcomes {
        if let Some(deviation) = &outcome.deviation {
            println!("{}: {}: {deviation}", outcome.subject, outcome.case);
            seen.insert((outcome.subject, outcome.case));
        }
    }
    let known: BTreeSet<_> = DEVIATIONS.iter().copied().collect();
    let new: Vec<_> = seen.difference(&known).collect();
    ensure!(new.is_empty(), "new deviations: {new:#?}");
    let gone: Vec<_> = known.difference(&seen).collect();
    ensure!(gone.is_empty(), "no deviations any more, take them from the list: {gone:#?}");
    Ok(())
}

#[test]
fn the_table_in_the_documentation_is_that_of_the_list() -> Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/shims.md");
    let text = fs::read_to_string(path).context(path)?;
    let names = [OURS, RUNC, OLD, NEW];
    for case in CASES {
        let cells = names.map(|name| match DEVIATIONS.contains(&(name, case.name)) {
            true => "**no**",
            false => "yes",
        });
        let row = format!("| {} | {} |", case.name, cells.join(" | "));
        ensure!(text.contains(&row), "docs/shims.md has no row\n{row}");
    }
    Ok(())
}
