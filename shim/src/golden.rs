//! What crosses from one release to another, as the first one writes it (`golden/`, and here). A test
//! that fails here says that daemons, shims or files of another release will not be understood: what is
//! new must be left out where it has its default, and what was there must stay. The files are never
//! changed; a form that must differ gets a version and a file of its own.
//!
//! The state of a shim is in `pod/saved.rs`, the options of an OCI runtime in the daemon's `shims.rs`, and
//! `integration/tests/skew.rs` is the same with programs.

use std::time::{Duration, UNIX_EPOCH};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    bundle::{Bundle, Exit, ExitRecord, Namespace},
    control::{self, Attach, Hello, Kind, Relay, Request},
    handover::Handover,
    options::{self, PodOptions},
};

/// Nothing is lost in reading, and nothing is written that was not there.
fn reads_and_writes<T: Serialize + DeserializeOwned>(golden: &str) -> T {
    let golden: Value = serde_json::from_str(golden).unwrap();
    let read: T = serde_json::from_value(golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), golden);
    read
}

#[test]
fn what_a_shim_hands_over_is_as_it_was() {
    reads_and_writes::<Handover>(include_str!("golden/handover_v1.json"));
    // The least that any release has handed over.
    let least = r#"{"bundle":"/b","state":{"version":1,"needs":1},"listener":3}"#;
    let least: Handover = serde_json::from_str(least).unwrap();
    assert!(least.control.is_none() && least.events.is_empty());
}

#[test]
fn the_options_of_a_pod_are_as_they_were() {
    let read: PodOptions = reads_and_writes(include_str!("golden/pod_options_v1.json"));
    assert_eq!(read.cgroup.as_deref(), Some("/kubepods/pod1"));
    assert_eq!(serde_json::from_str::<PodOptions>("{}").unwrap(), PodOptions::default());
    assert_eq!(
        [options::POD_OPTIONS, options::CRI_LOG, options::HELD_STDIN, options::HELD_STDIN_ONCE],
        ["holdfast.dev/PodOptions", "cri-log://", "holdfast-stdin://", "holdfast-stdin://?once"]
    );
}

#[test]
fn the_record_of_an_exit_is_as_it_was() {
    let golden = r#"{"pid":42,"status":{"Code":3},"at":"2023-11-14T22:13:20.000000005Z","oom_killed":false}"#;
    let record = ExitRecord {
        pid: 42,
        status: Exit::Code(3),
        started_at: None,
        at: UNIX_EPOCH + Duration::new(1_700_000_000, 5),
        oom_killed: false,
        lost: false,
    };
    assert_eq!(serde_json::to_string(&record).unwrap(), golden);
    assert_eq!(serde_json::from_str::<ExitRecord>(golden).unwrap(), record);
    let killed =
        ExitRecord { status: Exit::Signal(9), oom_killed: true, lost: true, ..record.clone() };
    let golden = r#"{"pid":42,"status":{"Signal":9},"at":"2023-11-14T22:13:20.000000005Z","oom_killed":true,"lost":true}"#;
    assert_eq!(serde_json::to_string(&killed).unwrap(), golden);
    let started = ExitRecord { started_at: Some(UNIX_EPOCH), ..record };
    let golden = r#"{"pid":42,"status":{"Code":3},"started_at":"1970-01-01T00:00:00.000000000Z","at":"2023-11-14T22:13:20.000000005Z","oom_killed":false}"#;
    assert_eq!(serde_json::to_string(&started).unwrap(), golden);
    assert_eq!(serde_json::from_str::<ExitRecord>(golden).unwrap(), started);
}

#[test]
fn the_files_of_a_bundle_have_the_names_that_they_had() {
    let bundle = Bundle::new("/b");
    let names = [
        bundle.config(),
        bundle.rootfs(),
        bundle.stdout(),
        bundle.stderr(),
        bundle.stdin(),
        bundle.exit_record(),
        bundle.init_pid(),
        bundle.options(),
        bundle.criu_config(),
        bundle.address(),
        bundle.shim_state(),
        bundle.shim_pid(),
        bundle.shim_log(),
        bundle.io_socket(),
        bundle.hostname(),
        bundle.hosts(),
        bundle.resolv_conf(),
        bundle.shm(),
        bundle.unfinished()[0].clone(),
        bundle.unfinished()[1].clone(),
    ];
    let names: Vec<_> =
        names.iter().map(|path| path.strip_prefix("/b").unwrap().to_str().unwrap()).collect();
    assert_eq!(
        names.join(" "),
        "config.json rootfs stdout stderr stdin exit.json init.pid options.json criu.conf address \
         shim.json shim.pid log io.sock hostname hosts resolv.conf shm stdout.unfinished \
         stderr.unfinished"
    );
    let pins = Namespace::ALL.map(|kind| bundle.namespace(kind).display().to_string());
    assert_eq!(pins, ["/b/ns/net", "/b/ns/ipc", "/b/ns/uts", "/b/ns/user", "/b/ns/pid"]);
}

#[test]
fn the_words_of_the_control_socket_are_as_they_were() {
    let some = Attach { stdin: true, stdout: true, stderr: false };
    let relay = Relay {
        container: "c".into(),
        bundle: "/b".into(),
        log: None,
        stdin: true,
        stdin_once: false,
        stderr: true,
    };
    for (request, line) in [
        (Request::Hello, "hello"),
        (Request::Keep, "keep"),
        (Request::Adopt, "adopt"),
        (Request::Upgrade("/opt/shim".into()), "upgrade /opt/shim"),
        (Request::Reopen("c".into()), "reopen c"),
        (Request::Attach("c".into(), some), "attach c io"),
        (Request::Settle("c".into()), "settle c"),
        (
            Request::Relay(relay),
            r#"relay {"container":"c","bundle":"/b","log":null,"stdin":true,"stdin_once":false,"stderr":true}"#,
        ),
    ] {
        assert_eq!(request.line(), format!("{line}\n"));
        assert_eq!(Request::parse(line), Some(request));
    }
    let hello = Hello { control: 2, version: "0.1.0".into(), state: 1, orphaned: false };
    let golden = r#"{"control":2,"version":"0.1.0","state":1,"orphaned":false}"#;
    assert_eq!(serde_json::to_string(&hello).unwrap(), golden);
    let kinds =
        [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::End, Kind::Resize, Kind::Keep, Kind::Drop];
    for (number, kind) in (0..).zip(kinds) {
        assert_eq!(control::header(kind, 0x0102_0304), [number, 1, 2, 3, 4]);
    }
}
