//! The daemon's configuration: `RawConfig` is what the files say, [`Config`] is what is meant.
//!
//! One file and its drop-ins are laid over the built-in defaults (`config/default.toml`) key by key;
//! see `config/raw.rs`. A [`Config`] in hand is complete and valid: every default is filled in and
//! every choice made. What it cannot promise is that the programs and directories it names exist:
//! those come and go while the daemon runs ([`Config::missing_programs`]).

mod raw;
mod units;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs, io,
    net::SocketAddr,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

pub use raw::Origin;
use raw::{
    Layers, RawConfig, RawGrpc, RawHandler, RawImages, RawLog, RawMetrics, RawNetwork, RawNri,
    RawRuntime, RawStreaming, RawTracing,
};

use serde::{Deserialize, Serialize};

use crate::error::{Kind, Kinded};

/// Where the configuration is when the command line names no file.
pub const DEFAULT_FILE: &str = "/etc/holdfast/config.toml";

/// Our shim's name, as containerd derives it from `io.containerd.holdfast.v2`.
pub const SHIM: &str = "containerd-shim-holdfast-v2";

/// `sun_path` of a unix socket, less its final zero byte (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// The resolved configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What outlives a boot: database, layers, images.
    pub root: PathBuf,
    /// What does not: sockets, pinned namespaces, bundles.
    pub state: PathBuf,
    /// `[grpc]`
    pub grpc: Grpc,
    /// `[streaming]`
    pub streaming: Streaming,
    /// `[network]`
    pub network: Network,
    /// `[images]`
    pub images: Images,
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[metrics]`: where to serve Prometheus metrics, if at all.
    pub metrics_address: Option<SocketAddr>,
    /// `[tracing]`
    pub tracing: Tracing,
    /// `[nri]`
    pub nri: Nri,
    /// `[log]`
    pub log: Log,
}

/// The CRI socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    /// Path of the unix socket; made with mode 0660.
    pub socket: PathBuf,
    /// Group id that owns the socket.
    pub gid: u32,
}

/// The HTTP server for exec, attach and port-forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// Listen address; port 0 picks a free one.
    pub address: SocketAddr,
    /// Certificate and key files.
    pub tls: Option<(PathBuf, PathBuf)>,
}

/// CNI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Where network configurations are; the first by name is used.
    pub conf_dir: PathBuf,
    /// Where plugins are, in order of search.
    pub bin_dirs: Vec<PathBuf>,
    /// Deadline of one ADD, DEL or CHECK of the whole list.
    pub timeout: Duration,
}

/// Images and registries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// containerd's `hosts.toml` layout.
    pub hosts_dir: PathBuf,
    /// A containers-registries.conf(5) file.
    pub registries_conf: Option<PathBuf>,
    /// The node's own credentials, a docker config.json, which need not exist.
    pub auth_file: Option<PathBuf>,
    /// A containers-policy.json(5) file.
    pub policy: Option<PathBuf>,
    /// Registries ("host" or "host:port") that may be reached over plain HTTP. Loopback always may.
    pub insecure_registries: Vec<String>,
    /// Layers of one image that are downloaded and unpacked at a time.
    pub max_parallel_layers: usize,
    /// A pull that receives nothing for so long is given up.
    pub stall_timeout: Duration,
    /// A pull that takes longer is given up.
    pub pull_timeout: Duration,
    /// Bound on what one layer may unpack to, in bytes.
    pub max_layer_size: u64,
    /// How layers that come are kept.
    pub layer_format: LayerFormat,
}

/// How a layer is kept on disk. Layers of both kinds can be in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerFormat {
    /// A directory of files.
    Directories,
    /// An EROFS image, mounted from its file.
    Erofs,
}

/// OCI runtimes and what drives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// The handler for pods that name none; always a key of `handlers`.
    pub default: String,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// By name as in RuntimeClass.
    pub handlers: BTreeMap<String, Handler>,
    /// Our shim's binary.
    pub shim: PathBuf,
    /// Deadline of one call of an OCI runtime (create, start, exec, ...).
    pub timeout: Duration,
    /// How long output is still read after an ExecSync's command has exited.
    pub exec_drain: Duration,
    /// Largest output of one ExecSync, each of stdout and stderr, in bytes.
    pub exec_output_limit: usize,
    /// `pids.max` of a container that is not given one; 0: unlimited.
    pub pids_limit: i64,
    /// Where CDI specifications are; a later directory goes before an earlier one.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// A container's devices belong to its runAsUser and runAsGroup.
    pub device_ownership_from_security_context: bool,
    /// A file of block I/O classes.
    pub blockio_config: Option<PathBuf>,
}

/// A runtime handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handler {
    /// An OCI command line (runc, crun, ...) under our shim.
    Oci {
        /// Name or path of the program.
        path: PathBuf,
        /// A privileged container gets only the devices that it asks for.
        privileged_without_host_devices: bool,
    },
    /// Another implementation of containerd's shim v2.
    Foreign(ForeignHandler),
}

impl Handler {
    /// What runs the containers, as far as it is known: the OCI command line, else the shim.
    pub fn runtime(&self) -> &Path {
        match self {
            Handler::Oci { path, .. } => path,
            Handler::Foreign(foreign) => foreign.path.as_deref().unwrap_or(&foreign.shim),
        }
    }

    /// Whether a privileged container gets only the devices that it asks for.
    pub fn privileged_without_host_devices(&self) -> bool {
        match self {
            Handler::Oci { privileged_without_host_devices, .. } => {
                *privileged_without_host_devices
            }
            Handler::Foreign(foreign) => foreign.privileged_without_host_devices,
        }
    }
}

/// How another shim is driven.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignHandler {
    /// Name or path of the shim binary.
    pub shim: PathBuf,
    /// The OCI command line that it is to drive: then it is given `containerd.runc.v1.Options`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// A file of the shim's own options: then it is given `runtimeoptions.v1.Options`.
    #[serde(default)]
    pub options: Option<PathBuf>,
    /// What it is given for the pod itself.
    #[serde(default)]
    pub sandbox: Sandboxing,
    /// A privileged container gets only the devices that it asks for.
    #[serde(default)]
    pub privileged_without_host_devices: bool,
}

/// What a foreign shim is given for a pod itself, besides its containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandboxing {
    /// A container that only waits, made first and named as the pod: what every shim knows that was
    /// written for Kubernetes.
    #[default]
    Container,
    /// Nothing: containers join the pod's namespaces.
    None,
}

impl Sandboxing {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Sandboxing::Container => "container",
            Sandboxing::None => "none",
        }
    }
}

/// Who makes a container's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime writes cgroupfs itself.
    Cgroupfs,
    /// The runtime asks systemd over D-Bus.
    Systemd,
}

/// Node Resource Interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nri {
    /// Off: no socket is made and no plugin started.
    pub enabled: bool,
    /// Where plugins connect.
    pub socket: PathBuf,
    /// Pre-registered plugins.
    pub plugin_dir: PathBuf,
    /// Their configurations.
    pub conf_dir: PathBuf,
    /// No socket is made: only pre-registered plugins.
    pub disable_connections: bool,
    /// How long a plugin has from its connection to its registration.
    pub registration_timeout: Duration,
    /// How long a plugin has for one request.
    pub request_timeout: Duration,
    /// The same for particular plugins, by name or "index-name".
    pub plugin_timeouts: BTreeMap<String, Duration>,
    /// `[nri.validator]`
    pub validator: NriValidator,
}

/// What plugins may adjust, and which must be there; as it is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NriValidator {
    /// No OCI hooks.
    pub reject_oci_hook_adjustment: bool,
    /// Not the filter of a container that asks for the default profile.
    pub reject_runtime_default_seccomp_adjustment: bool,
    /// No filter for a container that asks for none.
    pub reject_unconfined_seccomp_adjustment: bool,
    /// Not the filter of a container that brings its own.
    pub reject_custom_seccomp_adjustment: bool,
    /// No namespaces.
    pub reject_namespace_adjustment: bool,
    /// No sysctls.
    pub reject_sysctl_adjustment: bool,
    /// Without each of these no container is made.
    pub required_plugins: Vec<String>,
    /// Key of an annotation that makes a pod's containers do without them; empty: none does.
    pub tolerate_missing_plugins_annotation: String,
}

/// OpenTelemetry traces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// An OTLP collector's gRPC address ("http://127.0.0.1:4317"), if traces are to be sent.
    pub endpoint: Option<String>,
    /// How many of a million requests, of those that nobody has decided on, are traced.
    pub samples_per_million: u32,
}

/// The daemon's own log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A `tracing` filter: "info", "debug,hyper=warn".
    pub level: String,
    /// One JSON object per line instead of text.
    pub json: bool,
}

/// Why there is no configuration. Each names the key, and the file and line that set it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is there but cannot be read, or was named and is not there.
    #[error("read configuration {}", file.display())]
    Read {
        /// The file or directory.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML.
    #[error("{at}: {problem}")]
    Syntax {
        /// Where.
        at: Origin,
        /// The parser's words.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{at}: unknown key {key}{}", did_you_mean(nearest))]
    UnknownKey {
        /// Dotted.
        key: String,
        /// Where.
        at: Origin,
        /// The valid key that was most likely meant.
        nearest: Option<String>,
    },
    /// A value of the wrong type.
    #[error("{at}: {key} is {found}, it must be {expected}")]
    WrongType {
        /// Dotted.
        key: String,
        /// Where.
        at: Origin,
        /// Type of the value.
        found: &'static str,
        /// Type of the key.
        expected: &'static str,
    },
    /// A value of the right type that makes no sense.
    #[error("{at}: {key} = {value} is not valid: {rule}")]
    Invalid {
        /// Dotted.
        key: String,
        /// Where.
        at: Origin,
        /// As TOML.
        value: String,
        /// What is allowed.
        rule: String,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    match nearest {
        Some(key) => format!(", did you mean {key}?"),
        None => "; `holdfastd config default` lists all keys".to_owned(),
    }
}

impl Config {
    /// Reads `path` and `path.d/*.toml` over the defaults. Without a path, [`DEFAULT_FILE`], which
    /// need not exist.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        let file = path.unwrap_or(Path::new(DEFAULT_FILE));
        let mut layers = Layers::defaults();
        if !layers.add_file(file)? && path.is_some() {
            return Err(Error::Read { file: file.into(), source: io::ErrorKind::NotFound.into() });
        }
        let mut drop_ins = file.as_os_str().to_owned();
        drop_ins.push(".d");
        layers.add_dir(Path::new(&drop_ins))?;
        resolve(&layers)
    }

    /// Reads `text`, as if it were a file called `name`, over the defaults.
    pub fn parse(text: &str, name: &Path) -> Result<Self, Error> {
        let mut layers = Layers::defaults();
        layers.add(text, name)?;
        resolve(&layers)
    }

    /// A commented file that has every key at its default.
    pub fn default_toml() -> String {
        raw::DEFAULT.to_owned()
    }

    /// Every key with its value, without comments; [`Config::parse`] reads it as the same `Config`.
    pub fn to_toml(&self) -> String {
        toml::to_string(&raw_of(self)).expect("a RawConfig is tables, strings and numbers")
    }

    /// Programs that the configuration names and this node does not have, by key. Not an error: the
    /// default configuration names both runc and crun, and a node may have but one of them.
    pub fn missing_programs(&self) -> Vec<(String, PathBuf)> {
        let handlers = self.runtime.handlers.iter().map(|(name, handler)| match handler {
            Handler::Oci { path, .. } => vec![(format!("runtime.handlers.{name}.path"), path)],
            Handler::Foreign(foreign) => {
                let path = foreign.path.as_ref();
                std::iter::once((format!("runtime.handlers.{name}.shim"), &foreign.shim))
                    .chain(path.map(|path| (format!("runtime.handlers.{name}.path"), path)))
                    .collect()
            }
        });
        std::iter::once(("runtime.shim".to_owned(), self.runtime.shim.clone()))
            .chain(handlers.flatten().map(|(key, program)| (key, program.clone())))
            .filter(|(_, program)| find_program(program).is_none())
            .collect()
    }
}

fn resolve(layers: &Layers) -> Result<Config, Error> {
    let raw = layers.raw();
    let key = |key: &'static str| Key { layers, key: key.to_owned() };

    if raw.version != 1 {
        return Err(key("version").bad(&raw.version.to_string(), "this holdfastd reads version 1"));
    }
    let root = key("root").dir(&raw.root)?;
    let state = key("state").dir(&raw.state)?;
    if root == state {
        return Err(key("state").bad_text(&raw.state, "it must not be the same as root"));
    }
    let handlers = handlers(layers, raw.runtime.handlers)?;
    if !handlers.contains_key(&raw.runtime.default) {
        let names: Vec<_> = handlers.keys().map(String::as_str).collect();
        let rule = format!("it must be a key of [runtime.handlers]: {}", names.join(", "));
        return Err(key("runtime.default").bad_text(&raw.runtime.default, &rule));
    }
    let config = Config {
        grpc: Grpc {
            socket: key("grpc.socket").socket(&raw.grpc.socket)?,
            gid: key("grpc.gid").number(raw.grpc.gid, 0, i64::from(u32::MAX) - 1)?,
        },
        streaming: streaming(layers, &raw.streaming)?,
        network: Network {
            conf_dir: key("network.conf_dir").path(&raw.network.conf_dir)?,
            bin_dirs: key("network.bin_dirs").paths(&raw.network.bin_dirs)?,
            timeout: key("network.timeout").duration(&raw.network.timeout)?,
        },
        images: Images {
            hosts_dir: key("images.hosts_dir").path(&raw.images.hosts_dir)?,
            registries_conf: key("images.registries_conf").optional(&raw.images.registries_conf)?,
            auth_file: key("images.auth_file").optional(&raw.images.auth_file)?,
            policy: key("images.policy").optional(&raw.images.policy)?,
            insecure_registries: key("images.insecure_registries")
                .registries(raw.images.insecure_registries)?,
            max_parallel_layers: key("images.max_parallel_layers").number(
                raw.images.max_parallel_layers,
                1,
                64,
            )?,
            stall_timeout: key("images.stall_timeout").duration(&raw.images.stall_timeout)?,
            pull_timeout: key("images.pull_timeout").duration(&raw.images.pull_timeout)?,
            max_layer_size: key("images.max_layer_size").size(&raw.images.max_layer_size)?,
            layer_format: match raw.images.layer_format.as_str() {
                "directories" => LayerFormat::Directories,
                "erofs" => LayerFormat::Erofs,
                other => {
                    let rule = "it must be \"directories\" or \"erofs\"";
                    return Err(key("images.layer_format").bad_text(other, rule));
                }
            },
        },
        runtime: Runtime {
            default: raw.runtime.default,
            cgroup_driver: match raw.runtime.cgroup_driver.as_str() {
                "auto" => native_cgroup_driver(Path::new("/")),
                "cgroupfs" => CgroupDriver::Cgroupfs,
                "systemd" => CgroupDriver::Systemd,
                other => {
                    let rule = "it must be \"auto\", \"cgroupfs\" or \"systemd\"";
                    return Err(key("runtime.cgroup_driver").bad_text(other, rule));
                }
            },
            handlers,
            shim: match raw.runtime.shim.as_str() {
                "" => default_shim(),
                given => key("runtime.shim").program(given)?,
            },
            timeout: key("runtime.timeout").duration(&raw.runtime.timeout)?,
            exec_drain: key("runtime.exec_drain").duration(&raw.runtime.exec_drain)?,
            exec_output_limit: usize::try_from(
                key("runtime.exec_output_limit").size(&raw.runtime.exec_output_limit)?,
            )
            .unwrap_or(usize::MAX),
            pids_limit: key("runtime.pids_limit").number(
                raw.runtime.pids_limit,
                0,
                i64::from(i32::MAX),
            )?,
            cdi_spec_dirs: key("runtime.cdi_spec_dirs").paths(&raw.runtime.cdi_spec_dirs)?,
            device_ownership_from_security_context: raw
                .runtime
                .device_ownership_from_security_context,
            blockio_config: key("runtime.blockio_config").optional(&raw.runtime.blockio_config)?,
        },
        metrics_address: match raw.metrics.address.as_str() {
            "" => None,
            given => Some(key("metrics.address").address(given)?),
        },
        tracing: Tracing {
            endpoint: match raw.tracing.endpoint.as_str() {
                "" => None,
                given => Some(key("tracing.endpoint").collector(given)?),
            },
            samples_per_million: key("tracing.samples_per_million").number(
                raw.tracing.samples_per_million,
                0,
                1_000_000,
            )?,
        },
        nri: Nri {
            enabled: raw.nri.enabled,
            socket: key("nri.socket").socket(&raw.nri.socket)?,
            plugin_dir: key("nri.plugin_dir").path(&raw.nri.plugin_dir)?,
            conf_dir: key("nri.conf_dir").path(&raw.nri.conf_dir)?,
            disable_connections: raw.nri.disable_connections,
            registration_timeout: key("nri.registration_timeout")
                .duration(&raw.nri.registration_timeout)?,
            request_timeout: key("nri.request_timeout").duration(&raw.nri.request_timeout)?,
            plugin_timeouts: key("nri.plugin_timeouts")
                .plugin_timeouts(&raw.nri.plugin_timeouts)?,
            validator: nri_validator(layers, raw.nri.validator)?,
        },
        log: Log {
            level: key("log.level").log_filter(raw.log.level)?,
            json: match raw.log.format.as_str() {
                "text" => false,
                "json" => true,
                other => {
                    let rule = "it must be \"text\" or \"json\"";
                    return Err(key("log.format").bad_text(other, rule));
                }
            },
        },
        root,
        state,
    };
    if config.nri.socket == config.grpc.socket {
        return Err(
            key("nri.socket").bad_text(&raw.nri.socket, "it must not be the same as grpc.socket")
        );
    }
    Ok(config)
}

fn nri_validator(layers: &Layers, validator: NriValidator) -> Result<NriValidator, Error> {
    let key = Key { layers, key: "nri.validator.required_plugins".to_owned() };
    match validator.required_plugins.iter().find(|name| !is_plugin_name(name)) {
        Some(bad) => Err(key.bad_text(bad, "a plugin's name has letters, digits and . _ + - only")),
        None => Ok(validator),
    }
}

/// Whether NRI takes it as the name of a plugin.
pub(crate) fn is_plugin_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
}

fn streaming(layers: &Layers, raw: &RawStreaming) -> Result<Streaming, Error> {
    let key = |key: &'static str| Key { layers, key: key.to_owned() };
    let tls = match (raw.tls_cert.as_str(), raw.tls_key.as_str()) {
        ("", "") => None,
        ("", given) => {
            let rule = "it needs streaming.tls_cert, which is empty";
            return Err(key("streaming.tls_key").bad_text(given, rule));
        }
        (given, "") => {
            let rule = "it needs streaming.tls_key, which is empty";
            return Err(key("streaming.tls_cert").bad_text(given, rule));
        }
        (cert, private) => {
            Some((key("streaming.tls_cert").path(cert)?, key("streaming.tls_key").path(private)?))
        }
    };
    Ok(Streaming { address: key("streaming.address").address(&raw.address)?, tls })
}

fn handlers(
    layers: &Layers,
    raw: BTreeMap<String, RawHandler>,
) -> Result<BTreeMap<String, Handler>, Error> {
    let mut handlers = BTreeMap::new();
    for (name, handler) in raw {
        let key = format!("runtime.handlers.{name}");
        let at = Key { layers, key: key.clone() };
        // The API server validates RuntimeClass.handler as a DNS label (RFC 1123).
        let label = !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !label {
            return Err(at.bad_text(
                &name,
                "a handler's name has up to 63 lower-case letters, digits and -, as in a RuntimeClass",
            ));
        }
        let of = |key_of: &str| Key { layers, key: format!("{key}.{key_of}") };
        let privileged_without_host_devices =
            handler.privileged_without_host_devices.unwrap_or_default();
        let program = |name: &str, value: Option<String>| {
            value.map(|value| of(name).program(&value)).transpose()
        };
        let (path, shim) = (program("path", handler.path)?, program("shim", handler.shim)?);
        let handler = match (path, shim) {
            (Some(path), None) => {
                for (name, given) in [("options", &handler.options), ("sandbox", &handler.sandbox)]
                {
                    if let Some(given) = given {
                        return Err(of(name).bad_text(given, "it needs `shim`"));
                    }
                }
                Handler::Oci { path, privileged_without_host_devices }
            }
            (path, Some(shim)) => {
                let name = shim.file_name().unwrap_or_default().to_string_lossy().into_owned();
                // It runs runc whether or not it is told to, but must be told how.
                let runs_runc = name.starts_with("containerd-shim-runc-");
                let options = match handler.options.as_deref() {
                    None => None,
                    Some(given) if path.is_some() || runs_runc => {
                        let rule = "a shim that drives an OCI runtime of `path` has other options";
                        return Err(of("options").bad_text(given, rule));
                    }
                    Some(given) => of("options").optional(given)?,
                };
                if path.is_none() && !runs_runc && privileged_without_host_devices {
                    return Err(at.bad(
                        "{ privileged_without_host_devices, shim }",
                        "privileged_without_host_devices needs `path`: a foreign shim decides for itself",
                    ));
                }
                Handler::Foreign(ForeignHandler {
                    path: path.or_else(|| runs_runc.then(|| "runc".into())),
                    shim,
                    options,
                    sandbox: match handler.sandbox.as_deref() {
                        None | Some("container") => Sandboxing::Container,
                        Some("none") => Sandboxing::None,
                        Some(other) => {
                            let rule = "it must be \"container\" or \"none\"";
                            return Err(of("sandbox").bad_text(other, rule));
                        }
                    },
                    privileged_without_host_devices,
                })
            }
            (None, None) => return Err(at.bad("{}", "it must have `path` or `shim`")),
        };
        handlers.insert(name, handler);
    }
    Ok(handlers)
}

/// A key whose value is being judged.
struct Key<'a> {
    layers: &'a Layers,
    key: String,
}

impl Key<'_> {
    fn bad(&self, value: &str, rule: &str) -> Error {
        Error::Invalid {
            at: self.layers.origin(&self.key),
            key: self.key.clone(),
            value: value.to_owned(),
            rule: rule.to_owned(),
        }
    }

    fn bad_text(&self, value: &str, rule: &str) -> Error {
        self.bad(&format!("{value:?}"), rule)
    }

    fn path(&self, text: &str) -> Result<PathBuf, Error> {
        let path = Path::new(text);
        let plain = path.components().all(|c| c != std::path::Component::ParentDir);
        if !path.is_absolute() || !plain || text.contains('\0') {
            return Err(self.bad_text(text, "it must be an absolute path without `..`"));
        }
        // Also drops doubled and trailing slashes, so that equal paths compare equal.
        Ok(path.components().collect())
    }

    fn dir(&self, text: &str) -> Result<PathBuf, Error> {
        let path = self.path(text)?;
        if path == Path::new("/") {
            return Err(self.bad_text(text, "it must be a directory of Holdfast's own"));
        }
        Ok(path)
    }

    fn optional(&self, text: &str) -> Result<Option<PathBuf>, Error> {
        if text.is_empty() { Ok(None) } else { self.path(text).map(Some) }
    }

    fn paths(&self, texts: &[String]) -> Result<Vec<PathBuf>, Error> {
        if texts.is_empty() {
            return Err(self.bad("[]", "it must name at least one directory"));
        }
        texts.iter().map(|t| self.path(t)).collect()
    }

    fn socket(&self, text: &str) -> Result<PathBuf, Error> {
        let path = self.dir(text)?;
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            let rule = format!("the path of a socket has at most {SOCKET_PATH_MAX} bytes");
            return Err(self.bad_text(text, &rule));
        }
        Ok(path)
    }

    fn program(&self, text: &str) -> Result<PathBuf, Error> {
        if text.starts_with('/') {
            return self.dir(text);
        }
        if text.is_empty() || text.contains(['/', '\0']) {
            let rule = "it must be an absolute path, or a name without / that is looked up in PATH";
            return Err(self.bad_text(text, rule));
        }
        Ok(text.into())
    }

    fn address(&self, text: &str) -> Result<SocketAddr, Error> {
        text.parse().map_err(|_| {
            let rule = "it must be ADDRESS:PORT with a numeric address, \
                        as in 127.0.0.1:9190 or [::1]:9190";
            self.bad_text(text, rule)
        })
    }

    fn collector(&self, text: &str) -> Result<String, Error> {
        if !crate::trace::BUILT {
            return Err(self.bad_text(text, "this build cannot send traces: leave it empty"));
        }
        let host = text.strip_prefix("http://").unwrap_or_default();
        match !host.is_empty() && url::Url::parse(text).is_ok() {
            true => Ok(text.to_owned()),
            false => Err(self.bad_text(
                text,
                "it must be the address of a collector's gRPC receiver without TLS, as in \
                 http://127.0.0.1:4317",
            )),
        }
    }

    fn duration(&self, text: &str) -> Result<Duration, Error> {
        const RULE: &str =
            "it must be a whole number and ms, s, m or h, from 1ms to 24h, as in \"60s\"";
        units::parse_duration(text)
            .filter(|d| !d.is_zero() && *d <= Duration::from_secs(24 * 3600))
            .ok_or_else(|| self.bad_text(text, RULE))
    }

    fn size(&self, text: &str) -> Result<u64, Error> {
        const RULE: &str =
            "it must be a whole number, at least 1, and B, KiB, MiB, GiB or TiB, as in \"16MiB\"";
        units::parse_size(text).filter(|n| *n > 0).ok_or_else(|| self.bad_text(text, RULE))
    }

    fn number<N: TryFrom<i64>>(&self, value: i64, least: i64, most: i64) -> Result<N, Error> {
        (least..=most).contains(&value).then(|| N::try_from(value).ok()).flatten().ok_or_else(
            || self.bad(&value.to_string(), &format!("it must be from {least} to {most}")),
        )
    }

    fn plugin_timeouts(&self, texts: &[String]) -> Result<BTreeMap<String, Duration>, Error> {
        let pair = |text: &String| {
            let (name, limit) = text.split_once('=')?;
            let limit = units::parse_duration(limit).filter(|limit| !limit.is_zero())?;
            is_plugin_name(name).then(|| (name.to_owned(), limit))
        };
        let rule = "it must be NAME=DURATION, as in \"balloons=5s\" or \"10-balloons=5s\"";
        texts.iter().map(|text| pair(text).ok_or_else(|| self.bad_text(text, rule))).collect()
    }

    fn registries(&self, texts: Vec<String>) -> Result<Vec<String>, Error> {
        for text in &texts {
            let (host, port) = match text.rsplit_once(':') {
                // In brackets, the last colon may be the address's own.
                Some((host, port)) if !port.contains(']') => (host, Some(port)),
                _ => (text.as_str(), None),
            };
            let host_ok = !host.is_empty()
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.[]:".contains(&b));
            let port_ok = port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p != 0));
            if !host_ok || !port_ok {
                let rule = "a registry is \"host\" or \"host:port\", without scheme and path";
                return Err(self.bad_text(text, rule));
            }
        }
        Ok(texts)
    }

    fn log_filter(&self, text: String) -> Result<String, Error> {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        // A lone word that is no level would be taken as a target, and silence everything else.
        let words = text.split(',').map(str::trim).all(|part| {
            part.contains(['=', '[']) || LEVELS.contains(&part.to_ascii_lowercase().as_str())
        });
        let parses = tracing_subscriber::EnvFilter::builder().parse(&text).is_ok();
        if !words || !parses {
            let rule = "it must be off, error, warn, info, debug or trace, \
                        or a filter as in \"info,hyper=warn\"";
            return Err(self.bad_text(&text, rule));
        }
        Ok(text)
    }
}

/// systemd, if it is the init of the system below `root` (sd_booted(3)) and PID 1 here.
fn native_cgroup_driver(root: &Path) -> CgroupDriver {
    let booted = root.join("run/systemd/system").is_dir();
    // In a container that only mounts the host's /run, PID 1 is something else.
    let init = fs::read_to_string(root.join("proc/1/comm")).is_ok_and(|c| c.trim() == "systemd");
    if booted && init { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs }
}

/// Our shim beside the running program, else in PATH, else its bare name (which is looked up again
/// when it is run).
fn default_shim() -> PathBuf {
    let beside = env::current_exe().ok().and_then(|exe| {
        // After an upgrade in place the kernel marks the path of the old file.
        let exe = exe.as_os_str().as_bytes();
        let exe = exe.strip_suffix(b" (deleted)").unwrap_or(exe);
        Some(Path::new(OsStr::from_bytes(exe)).parent()?.join(SHIM))
    });
    beside
        .filter(|path| is_executable(path))
        .or_else(|| find_program(Path::new(SHIM)))
        .unwrap_or_else(|| SHIM.into())
}

/// The file that is run for `program`: itself if it is a path, else the first of that name in PATH.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    if program.is_absolute() {
        return is_executable(program).then(|| program.into());
    }
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|p| is_executable(p))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The inverse of [`resolve`].
fn raw_of(config: &Config) -> RawConfig {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (tls_cert, tls_key) = match &config.streaming.tls {
        Some((cert, key)) => (text(cert), text(key)),
        None => Default::default(),
    };
    RawConfig {
        version: 1,
        root: text(&config.root),
        state: text(&config.state),
        grpc: RawGrpc { socket: text(&config.grpc.socket), gid: config.grpc.gid.into() },
        streaming: RawStreaming {
            address: config.streaming.address.to_string(),
            tls_cert,
            tls_key,
        },
        network: RawNetwork {
            conf_dir: text(&config.network.conf_dir),
            bin_dirs: config.network.bin_dirs.iter().map(|d| text(d)).collect(),
            timeout: units::format_duration(config.network.timeout),
        },
        images: RawImages {
            hosts_dir: text(&config.images.hosts_dir),
            registries_conf: config.images.registries_conf.as_deref().map(text).unwrap_or_default(),
            auth_file: config.images.auth_file.as_deref().map(text).unwrap_or_default(),
            policy: config.images.policy.as_deref().map(text).unwrap_or_default(),
            insecure_registries: config.images.insecure_registries.clone(),
            max_parallel_layers: config.images.max_parallel_layers as i64,
            stall_timeout: units::format_duration(config.images.stall_timeout),
            pull_timeout: units::format_duration(config.images.pull_timeout),
            max_layer_size: units::format_size(config.images.max_layer_size),
            layer_format: match config.images.layer_format {
                LayerFormat::Directories => "directories",
                LayerFormat::Erofs => "erofs",
            }
            .to_owned(),
        },
        runtime: RawRuntime {
            default: config.runtime.default.clone(),
            cgroup_driver: match config.runtime.cgroup_driver {
                CgroupDriver::Cgroupfs => "cgroupfs",
                CgroupDriver::Systemd => "systemd",
            }
            .to_owned(),
            shim: text(&config.runtime.shim),
            timeout: units::format_duration(config.runtime.timeout),
            exec_drain: units::format_duration(config.runtime.exec_drain),
            exec_output_limit: units::format_size(config.runtime.exec_output_limit as u64),
            pids_limit: config.runtime.pids_limit,
            cdi_spec_dirs: config.runtime.cdi_spec_dirs.iter().map(|d| text(d)).collect(),
            device_ownership_from_security_context: config
                .runtime
                .device_ownership_from_security_context,
            blockio_config: config.runtime.blockio_config.as_deref().map(text).unwrap_or_default(),
            handlers: config
                .runtime
                .handlers
                .iter()
                .map(|(name, handler)| {
                    let raw = match handler {
                        Handler::Oci { path, privileged_without_host_devices } => RawHandler {
                            path: Some(text(path)),
                            privileged_without_host_devices: privileged_without_host_devices
                                .then_some(true),
                            ..RawHandler::default()
                        },
                        Handler::Foreign(foreign) => RawHandler {
                            path: foreign.path.as_deref().map(text),
                            shim: Some(text(&foreign.shim)),
                            options: foreign.options.as_deref().map(text),
                            sandbox: Some(foreign.sandbox.name().to_owned()),
                            privileged_without_host_devices: foreign
                                .privileged_without_host_devices
                                .then_some(true),
                        },
                    };
                    (name.clone(), raw)
                })
                .collect(),
        },
        nri: RawNri {
            enabled: config.nri.enabled,
            socket: text(&config.nri.socket),
            plugin_dir: text(&config.nri.plugin_dir),
            conf_dir: text(&config.nri.conf_dir),
            disable_connections: config.nri.disable_connections,
            registration_timeout: units::format_duration(config.nri.registration_timeout),
            request_timeout: units::format_duration(config.nri.request_timeout),
            plugin_timeouts: config
                .nri
                .plugin_timeouts
                .iter()
                .map(|(name, limit)| format!("{name}={}", units::format_duration(*limit)))
                .collect(),
            validator: config.nri.validator.clone(),
        },
        metrics: RawMetrics {
            address: config.metrics_address.map(|a| a.to_string()).unwrap_or_default(),
        },
        tracing: RawTracing {
            endpoint: config.tracing.endpoint.clone().unwrap_or_default(),
            samples_per_million: config.tracing.samples_per_million.into(),
        },
        log: RawLog {
            level: config.log.level.clone(),
            format: if config.log.json { "json" } else { "text" }.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests;
