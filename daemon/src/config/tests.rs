use std::fs;

use toml::Table;

use super::*;
use crate::error::chain;

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(text, Path::new("/etc/holdfast/config.toml"))
}

fn oci(program: &str) -> Handler {
    Handler::Oci { path: program.into(), privileged_without_host_devices: false }
}

fn refused(text: &str) -> String {
    chain(&parse(text).unwrap_err())
}

#[test]
fn the_default_file_and_no_file_are_the_same() {
    assert_eq!(parse(&Config::default_toml()).unwrap(), parse("").unwrap());
}

#[test]
fn defaults_are_what_tools_rely_on() {
    let config = parse("").unwrap();
    assert_eq!(config.root, Path::new("/var/lib/holdfast"));
    assert_eq!(config.state, Path::new("/run/holdfast"));
    assert_eq!(config.grpc.socket, Path::new("/run/holdfast/holdfast.sock"));
    assert_eq!(config.streaming.address, "127.0.0.1:0".parse().unwrap());
    assert_eq!(config.streaming.tls, None);
    assert_eq!(config.network.conf_dir, Path::new("/etc/cni/net.d"));
    assert_eq!(config.network.bin_dirs, [Path::new("/opt/cni/bin"), Path::new("/usr/lib/cni")]);
    assert_eq!(config.images.hosts_dir, Path::new("/etc/holdfast/certs.d"));
    assert_eq!(config.images.registries_conf, None);
    assert_eq!(config.images.max_parallel_layers, 6);
    assert_eq!(config.runtime.default, "runc");
    assert_eq!(config.runtime.handlers["runc"], oci("runc"));
    assert_eq!(config.runtime.handlers["crun"], oci("crun"));
    assert!(config.nri.enabled);
    assert_eq!(config.nri.socket, Path::new("/var/run/nri/nri.sock"));
    assert_eq!(config.metrics_address, None);
    assert_eq!(config.log, Log { level: "info".into(), json: false });
    assert_eq!(config.network.timeout, Duration::from_secs(60));
    assert_eq!(config.runtime.exec_output_limit, 16 << 20);
}

#[test]
fn a_dump_reads_back_as_the_same_configuration() {
    let config = parse(
        r#"
        root = "/a//b/"
        [streaming]
        tls_cert = "/c.pem"
        tls_key = "/k.pem"
        [images]
        registries_conf = "/etc/containers/registries.conf"
        insecure_registries = ["registry", "registry:5000", "[fd00::1]:5000"]
        stall_timeout = "1500ms"
        [runtime.handlers.kata]
        shim = "containerd-shim-kata-v2"
        options = "/etc/kata/configuration.toml"
        [runtime.handlers.old]
        shim = "/opt/containerd-shim-runc-v2"
        path = "crun"
        sandbox = "none"
        privileged_without_host_devices = true
        [metrics]
        address = "[::1]:9190"
        [log]
        level = "info,hyper=warn"
        format = "json"
        "#,
    )
    .unwrap();
    assert_eq!(config.root, Path::new("/a/b"));
    assert_eq!(parse(&config.to_toml()).unwrap(), config);
}

#[test]
fn later_files_win_key_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    fs::write(&file, "[log]\nlevel = \"warn\"\nformat = \"json\"\n[grpc]\ngid = 7").unwrap();
    let drop_ins = dir.path().join("config.toml.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(drop_ins.join("20-b.toml"), "[log]\nlevel = \"trace\"").unwrap();
    fs::write(drop_ins.join("10-a.toml"), "[log]\nlevel = \"debug\"\n[grpc]\ngid = 8").unwrap();
    fs::write(drop_ins.join("30-c.conf"), "not read").unwrap();
    fs::write(drop_ins.join(".30-c.toml"), "not read: an editor's").unwrap();
    let config = Config::load(Some(&file)).unwrap();
    assert_eq!(config.log, Log { level: "trace".into(), json: true });
    assert_eq!(config.grpc.gid, 8);
}

#[test]
fn a_drop_in_can_change_a_handlers_form() {
    let config = parse("[runtime.handlers.runc]\nshim = \"containerd-shim-runc-v2\"").unwrap();
    let Handler::Foreign(foreign) = &config.runtime.handlers["runc"] else {
        panic!("{:?}", config.runtime.handlers["runc"])
    };
    assert_eq!(foreign.shim, Path::new("containerd-shim-runc-v2"));
    assert_eq!(foreign.path.as_deref(), Some(Path::new("runc")), "what it runs by itself");
    assert_eq!(foreign.sandbox, Sandboxing::Container);
    assert_eq!(config.runtime.handlers.len(), 2, "crun is still there");
}

#[test]
fn a_named_file_must_exist() {
    let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
    assert_eq!(chain(&error), "read configuration /nonexistent/config.toml: entity not found");
}

#[test]
fn unknown_keys_are_named_with_the_nearest_valid_one() {
    let at = "/etc/holdfast/config.toml";
    assert_eq!(
        refused("\n[network]\nconfdir = \"/a\""),
        format!("{at}:3: unknown key network.confdir, did you mean network.conf_dir?")
    );
    // In the wrong table.
    assert_eq!(
        refused("cgroup_driver = \"systemd\""),
        format!("{at}:1: unknown key cgroup_driver, did you mean runtime.cgroup_driver?")
    );
    assert_eq!(refused("[metric]"), format!("{at}:1: unknown key metric, did you mean metrics?"));
    assert_eq!(
        refused("[runtime.handlers.x]\npth = \"x\""),
        format!(
            "{at}:2: unknown key runtime.handlers.x.pth, did you mean runtime.handlers.x.path?"
        )
    );
    assert_eq!(
        refused("zzzzzz = 1"),
        format!("{at}:1: unknown key zzzzzz; `holdfastd config default` lists all keys")
    );
}

#[test]
fn wrong_types_say_what_is_allowed() {
    for (text, expected) in [
        ("root = 1", "root is a whole number, it must be a string"),
        ("[nri]\nenabled = \"yes\"", "nri.enabled is a string, it must be true or false"),
        ("network = 1", "network is a whole number, it must be a table"),
        (
            "[network]\nbin_dirs = \"/a\"",
            "network.bin_dirs is a string, it must be a list of strings",
        ),
        ("[network]\nbin_dirs = [1]", "it must be a list of strings"),
        ("[images]\nmax_parallel_layers = 1.5", "is a fraction, it must be a whole number"),
        (
            "[runtime.handlers]\nrunc = \"runc\"",
            "runtime.handlers.runc is a string, it must be a table",
        ),
        ("[network]\ntimeout = 60", "network.timeout is a whole number, it must be a string"),
    ] {
        let error = refused(text);
        assert!(error.starts_with("/etc/holdfast/config.toml:"), "{error}");
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn impossible_values_say_what_is_allowed() {
    for (text, expected) in [
        ("version = 2", "version = 2 is not valid: this holdfastd reads version 1"),
        ("root = \"var\"", "root = \"var\" is not valid: it must be an absolute path"),
        ("root = \"/\"", "a directory of Holdfast's own"),
        ("root = \"/var/../etc\"", "without `..`"),
        ("root = \"/run/holdfast/\"", "must not be the same as root"),
        ("[grpc]\nsocket = \"holdfast.sock\"", "absolute path"),
        ("[grpc]\ngid = -1", "grpc.gid = -1 is not valid: it must be from 0"),
        ("[streaming]\naddress = \"localhost:0\"", "ADDRESS:PORT with a numeric address"),
        ("[streaming]\ntls_cert = \"/c\"", "needs streaming.tls_key"),
        ("[streaming]\ntls_key = \"/k\"", "needs streaming.tls_cert"),
        ("[network]\nbin_dirs = []", "at least one directory"),
        ("[network]\nbin_dirs = [\"bin\"]", "absolute path"),
        ("[network]\ntimeout = \"0s\"", "whole number and ms, s, m or h"),
        ("[network]\ntimeout = \"60\"", "whole number and ms, s, m or h"),
        ("[images]\nmax_parallel_layers = 0", "it must be from 1 to 64"),
        ("[images]\nmax_layer_size = \"10GB\"", "KiB, MiB, GiB or TiB"),
        ("[images]\nlayer_format = \"squashfs\"", "\"directories\" or \"erofs\""),
        ("[images]\ninsecure_registries = [\"http://r\"]", "without scheme and path"),
        ("[images]\ninsecure_registries = [\"r:0\"]", "without scheme and path"),
        ("[runtime]\ndefault = \"kata\"", "it must be a key of [runtime.handlers]: crun, runc"),
        ("[runtime]\ncgroup_driver = \"cgroups\"", "\"auto\", \"cgroupfs\" or \"systemd\""),
        ("[runtime]\nshim = \"bin/shim\"", "looked up in PATH"),
        ("[runtime]\npids_limit = -1", "it must be from 0"),
        ("[runtime.handlers.x]", "it must have `path` or `shim`"),
        ("[runtime.handlers.x]\npath = \"a\"\nsandbox = \"none\"", "needs `shim`"),
        ("[runtime.handlers.x]\nshim = \"a\"\nsandbox = \"vm\"", "\"container\" or \"none\""),
        (
            "[runtime.handlers.x]\nshim = \"containerd-shim-runc-v2\"\noptions = \"/a\"",
            "has other options",
        ),
        ("[runtime.handlers.X]\npath = \"a\"", "as in a RuntimeClass"),
        ("[runtime.handlers.x]\npath = \"./a\"", "looked up in PATH"),
        ("[nri]\nsocket = \"/run/holdfast/holdfast.sock\"", "must not be the same as grpc.socket"),
        ("[metrics]\naddress = \"9190\"", "ADDRESS:PORT"),
        ("[tracing]\nsamples_per_million = 1000001", "from 0 to 1000000"),
        #[cfg(feature = "otlp")]
        ("[tracing]\nendpoint = \"127.0.0.1:4317\"", "http://127.0.0.1:4317"),
        #[cfg(not(feature = "otlp"))]
        ("[tracing]\nendpoint = \"http://127.0.0.1:4317\"", "this build cannot send traces"),
        ("[log]\nlevel = \"infoo\"", "off, error, warn, info, debug or trace"),
        ("[log]\nlevel = \"info,a=loud\"", "off, error, warn, info, debug or trace"),
        ("[log]\nformat = \"xml\"", "\"text\" or \"json\""),
    ] {
        let error = refused(text);
        assert!(
            error.starts_with("/etc/holdfast/config.toml:") || text.starts_with("root = \"/run"),
            "{error}"
        );
        assert!(error.contains(expected), "{text}: {error}");
    }
    let long = format!("[grpc]\nsocket = \"/{}\"", "a".repeat(107));
    assert!(refused(&long).contains("at most 107 bytes"));
}

#[test]
fn syntax_errors_are_one_line_with_a_place() {
    let error = refused("root = \"/a\"\nroot = \"/b\"");
    assert!(error.starts_with("/etc/holdfast/config.toml:2: "), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn every_default_is_a_field_and_every_field_has_a_default() {
    let defaults: Table = Config::default_toml().parse().unwrap();
    let fields = Table::try_from(raw_of(&parse("").unwrap())).unwrap();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    raw::leaves("", &defaults, &mut a);
    raw::leaves("", &fields, &mut b);
    a.sort();
    b.sort();
    assert_eq!(a, b);
}

#[test]
fn the_cgroup_driver_is_systemds_only_where_systemd_is_init() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("proc/1")).unwrap();
    fs::write(root.path().join("proc/1/comm"), "systemd\n").unwrap();
    assert_eq!(native_cgroup_driver(root.path()), CgroupDriver::Cgroupfs);
    fs::create_dir_all(root.path().join("run/systemd/system")).unwrap();
    assert_eq!(native_cgroup_driver(root.path()), CgroupDriver::Systemd);
    fs::write(root.path().join("proc/1/comm"), "tini\n").unwrap();
    assert_eq!(native_cgroup_driver(root.path()), CgroupDriver::Cgroupfs);
}

#[test]
fn programs_that_are_not_here_are_named() {
    let config = parse(
        "[runtime]\nshim = \"/bin/sh\"\n[runtime.handlers.runc]\npath = \"sh\"\n\
         [runtime.handlers.crun]\npath = \"sh\"\n[runtime.handlers.x]\nshim = \"no-such-shim\"",
    )
    .unwrap();
    let missing = config.missing_programs();
    assert_eq!(missing, [("runtime.handlers.x.shim".to_owned(), "no-such-shim".into())]);
}

#[test]
fn a_handler_may_keep_devices_from_privileged_containers() {
    let text = "[runtime.handlers.bare]\npath = \"runc\"\nprivileged_without_host_devices = true";
    let config = parse(text).unwrap();
    let bare = Handler::Oci { path: "runc".into(), privileged_without_host_devices: true };
    assert_eq!(config.runtime.handlers["bare"], bare);
    assert_eq!(Config::parse(&config.to_toml(), "dump".as_ref()).unwrap(), config);
    let text = "[runtime.handlers.x]\nshim = \"s\"\nprivileged_without_host_devices = true";
    assert!(refused(text).contains("needs `path`"), "{}", refused(text));
    let text = "[runtime.handlers.x]\npath = \"s\"\nprivileged_without_host_devices = 1";
    assert!(refused(text).contains("true or false"), "{}", refused(text));
}
