//! The binary contract: argv, the dialects of standard input and output, the socket's name.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use holdfast_protos::shim::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{Message, well_known_types::any::Any},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::bundle::Bundle;

/// Annotations that name a shim's group, the first one first.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// sun_path without its final zero; a longer name cannot be bound.
const SOCKET_MAX: usize = 106;

/// Where sockets are when nobody says.
const SOCKET_DIR: &str = "/run/containerd/s";

/// The environment's word on where sockets are.
pub(crate) const SOCKET_DIR_VARIABLE: &str = "HOLDFAST_SHIM_SOCKET_DIR";

/// What the binary is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Action {
    /// Serve on descriptor 3: what `start` leaves behind.
    #[default]
    Serve,
    /// Start a shim, or find the group's.
    Start,
    /// Clean up after a shim that is gone.
    Delete,
    /// Say whether this binary can take over the state on standard input.
    Look,
    /// Say what this binary is (`-info`).
    Info,
    /// Print the version (`-v`).
    Version,
}

/// The command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
    /// Of `serve`: the descriptor of what the code before this has handed over.
    pub(crate) handover: Option<i32>,
}

impl Arguments {
    /// Flags as Go programs take them: one dash or two, `-flag value` or `-flag=value`.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut action = None;
        let mut rest = arguments.into_iter();
        while let Some(argument) = rest.next() {
            let argument = text(argument)?;
            let Some(flag) = argument.strip_prefix('-').map(|a| a.strip_prefix('-').unwrap_or(a))
            else {
                if action.is_some() {
                    return Err(format!("unexpected argument {argument:?}"));
                }
                action = Some(match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    "look" => Action::Look,
                    other => {
                        return Err(format!(
                            "unknown action {other:?}; known are start and delete"
                        ));
                    }
                });
                continue;
            };
            let (name, given) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => parsed.debug = given.is_none_or(|value| value != "false"),
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket"
                | "handover" => {
                    let value = match given {
                        Some(value) => value,
                        None => {
                            text(rest.next().ok_or_else(|| format!("flag -{name} needs a value"))?)?
                        }
                    };
                    match name {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "publish-binary" => parsed.publish_binary = value,
                        "bundle" => parsed.bundle = value.into(),
                        "handover" => {
                            let number = value.parse().ok().filter(|fd| *fd > 2);
                            parsed.handover = Some(number.ok_or_else(|| {
                                format!("flag -handover needs a descriptor, not {value:?}")
                            })?);
                        }
                        // Of old daemons; the socket is ours to name.
                        _ => {}
                    }
                }
                _ => return Err(format!("unknown flag -{name}")),
            }
        }
        parsed.action = action.unwrap_or_default();
        if matches!(parsed.action, Action::Start | Action::Delete | Action::Serve) {
            for (flag, value) in [("namespace", &parsed.namespace), ("id", &parsed.id)] {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
                if value.is_empty() || !value.bytes().all(plain) || value.starts_with('.') {
                    return Err(format!(
                        "flag -{flag} needs a value of letters, digits, _ . + or -"
                    ));
                }
            }
        }
        Ok(parsed)
    }
}

fn text(argument: OsString) -> Result<String, String> {
    String::from_utf8(argument.into_vec()).map_err(|error| {
        format!("argument {:?} is not UTF-8", String::from_utf8_lossy(error.as_bytes()))
    })
}

/// What came on the standard input of `start`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// Nothing.
    Empty,
    /// Runtime options (containerd up to 2.2).
    Options(Any),
    /// The bootstrap protocol (containerd 2.3 and newer).
    Params(BootstrapParams),
}

impl Input {
    /// Tells the dialects apart. That bytes decode proves nothing: the two messages have fields of
    /// the same numbers. It is `BootstrapParams` when it names the id and namespace of the command
    /// line.
    pub(crate) fn parse(bytes: &[u8], arguments: &Arguments) -> Result<Self, String> {
        if bytes.is_empty() {
            return Ok(Input::Empty);
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(bytes)
            && params.instance_id == arguments.id
            && params.namespace == arguments.namespace
        {
            return Ok(Input::Params(params));
        }
        match Any::parse_from_bytes(bytes) {
            // A type URL has a dot or a slash; an id of another instance need not.
            Ok(any) if any.type_url.contains(['.', '/']) || any.value.is_empty() => {
                Ok(Input::Options(any))
            }
            _ => Err("standard input is neither runtime options nor the bootstrap parameters of \
                      this id and namespace"
                .into()),
        }
    }

    /// Where the daemon's TTRPC socket is, when the input says so.
    pub(crate) fn ttrpc_address(&self) -> Option<&str> {
        match self {
            Input::Params(params) => Some(&params.containerd_ttrpc_address),
            _ => None,
        }
        .map(String::as_str)
        .filter(|address| !address.is_empty())
    }

    /// The runtime options in it.
    pub(crate) fn options(&self) -> impl Iterator<Item = &Any> {
        let (one, many) = match self {
            Input::Empty => (None, &[][..]),
            Input::Options(any) => (Some(any), &[][..]),
            Input::Params(params) => (None, &params.extensions[..]),
        };
        one.into_iter().chain(many.iter().filter_map(|extension| extension.value.as_ref()))
    }

    fn socket_dir(&self) -> Option<PathBuf> {
        match self {
            Input::Params(params) => params.socket_dir.clone(),
            _ => None,
        }
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
    }
}

/// What a daemon can read of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// The address alone: containerd up to 1.6.
    Address,
    /// JSON, with this version of the Task service at most.
    Json(u32),
}

impl Reader {
    /// containerd from 1.7 on sets `MAX_SHIM_VERSION`. Its value is 2 in all of them, though 2.x take
    /// version 3; who knows better says so by `HOLDFAST_SHIM_VERSION=3`.
    pub(crate) fn from_environment() -> Self {
        if std::env::var("HOLDFAST_SHIM_VERSION").is_ok_and(|version| version == "3") {
            Reader::Json(3)
        } else if std::env::var_os("MAX_SHIM_VERSION").is_some() {
            Reader::Json(2)
        } else {
            Reader::Address
        }
    }
}

/// The answer of `start`, in the dialect of the question.
pub(crate) fn answer(input: &Input, reader: Reader, address: &str) -> Vec<u8> {
    match (input, reader) {
        (Input::Params(_), _) => {
            let mut result = BootstrapResult::new();
            result.version = 3;
            result.address = address.to_owned();
            result.protocol = "ttrpc".into();
            result.write_to_bytes().unwrap_or_default()
        }
        (_, Reader::Address) => address.as_bytes().to_vec(),
        (_, Reader::Json(version)) => {
            serde_json::json!({"version": version, "address": address, "protocol": "ttrpc"})
                .to_string()
                .into_bytes()
        }
    }
}

/// The group a container's shim serves: from its annotations, else the id itself. A pod of our
/// daemon has no configuration yet.
pub(crate) fn group(bundle: &Bundle, id: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Spec {
        #[serde(default)]
        annotations: std::collections::BTreeMap<String, String>,
    }
    let path = bundle.config();
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(id.to_owned()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let mut spec: Spec =
        serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    let named = GROUPS.iter().find_map(|name| spec.annotations.remove(*name));
    Ok(named.filter(|group| !group.is_empty()).unwrap_or_else(|| id.to_owned()))
}

/// The path of a group's socket: `<dir>/<sha256 of daemon address, namespace and group>`.
pub(crate) fn socket_path(
    arguments: &Arguments,
    input: &Input,
    group: &str,
) -> Result<PathBuf, String> {
    let dir = input
        .socket_dir()
        .or_else(|| std::env::var_os(SOCKET_DIR_VARIABLE).map(PathBuf::from))
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or_else(|| SOCKET_DIR.into());
    let mut name =
        Path::new(&arguments.address).join(&arguments.namespace).join(group).into_os_string();
    if arguments.debug {
        name.push("/debug");
    }
    let digest = Sha256::digest(name.into_vec());
    let path = dir.join(hex::encode(digest));
    if path.as_os_str().len() > SOCKET_MAX {
        return Err(format!(
            "socket directory {} is too long: the path of a socket has at most {SOCKET_MAX} bytes, \
             64 of which are its name",
            dir.display()
        ));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    fn start() -> Arguments {
        parse("-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id c1 start").unwrap()
    }

    #[test]
    fn the_daemons_command_line_is_understood() {
        assert_eq!(
            start(),
            Arguments {
                action: Action::Start,
                namespace: "k8s.io".into(),
                id: "c1".into(),
                address: "/run/c.sock".into(),
                publish_binary: "/bin/c".into(),
                bundle: PathBuf::new(),
                debug: false,
                handover: None,
            }
        );
        let delete = parse("--namespace=n --id=a -debug -bundle /b delete").unwrap();
        assert_eq!((delete.action, delete.debug), (Action::Delete, true));
        assert_eq!(delete.bundle, Path::new("/b"));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn a_wrong_command_line_says_what_is_wrong() {
        for (line, part) in [
            ("start", "-namespace"),
            ("-namespace n start", "-id"),
            ("-namespace n -id ../x start", "-id"),
            ("-namespace n -id", "-id needs a value"),
            ("-namespace n -id a run", "run"),
            ("-namespace n -id a -colour start", "-colour"),
            ("-namespace n -id a start delete", "delete"),
        ] {
            assert!(parse(line).unwrap_err().contains(part), "{line}");
        }
    }

    #[test]
    fn the_dialects_of_standard_input_are_told_apart() {
        let arguments = start();
        assert_eq!(Input::parse(&[], &arguments), Ok(Input::Empty));
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        any.value = vec![1, 2];
        let bytes = any.write_to_bytes().unwrap();
        assert_eq!(Input::parse(&bytes, &arguments), Ok(Input::Options(any)));
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".into();
        params.namespace = "k8s.io".into();
        let bytes = params.write_to_bytes().unwrap();
        assert_eq!(Input::parse(&bytes, &arguments), Ok(Input::Params(params.clone())));
        params.instance_id = "another".into();
        let bytes = params.write_to_bytes().unwrap();
        assert!(Input::parse(&bytes, &arguments).is_err());
    }

    #[test]
    fn the_answer_is_in_the_dialect_of_the_question() {
        let text = |reader| String::from_utf8(answer(&Input::Empty, reader, "unix:///s")).unwrap();
        let json = r#"{"version":2,"address":"unix:///s","protocol":"ttrpc"}"#;
        assert_eq!(text(Reader::Json(2)), json);
        assert_eq!(text(Reader::Address), "unix:///s");
        let params = Input::Params(BootstrapParams::new());
        let bytes = answer(&params, Reader::Json(2), "unix:///s");
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }

    #[test]
    fn annotations_group_shims_and_no_configuration_means_the_id() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        assert_eq!(group(&bundle, "c1").as_deref(), Ok("c1"));
        let write = |text: &str| std::fs::write(bundle.config(), text).unwrap();
        write(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"},"process":{}}"#);
        assert_eq!(group(&bundle, "c1").as_deref(), Ok("pod"));
        write(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#,
        );
        assert_eq!(group(&bundle, "c1").as_deref(), Ok("g"));
        write("{}");
        assert_eq!(group(&bundle, "c1").as_deref(), Ok("c1"));
        write("{");
        assert!(group(&bundle, "c1").is_err());
    }

    #[test]
    fn the_socket_is_named_as_containerd_names_it() {
        let mut params = BootstrapParams::new();
        params.socket_dir = Some("/run/s".into());
        let input = Input::Params(params);
        // sha256 of "/run/c.sock/k8s.io/c1"
        let path = socket_path(&start(), &input, "c1").unwrap();
        let digest = hex::encode(Sha256::digest(b"/run/c.sock/k8s.io/c1"));
        assert_eq!(path, Path::new("/run/s").join(digest));
        let mut params = BootstrapParams::new();
        params.socket_dir = Some(format!("/{}", "d".repeat(60)));
        assert!(socket_path(&start(), &Input::Params(params), "c1").unwrap_err().contains("106"));
    }

    proptest! {
        #[test]
        fn any_input_is_parsed_or_refused(bytes: Vec<u8>) {
            let _ = Input::parse(&bytes, &start());
        }

        #[test]
        fn any_command_line_is_parsed_or_refused(line: Vec<String>) {
            let _ = Arguments::parse(line.into_iter().map(OsString::from));
        }
    }
}
