//! What configuration files say: the layers, merged key by key, and where each key came from.
//!
//! `default.toml` is the bottom layer and the schema at once: a key that it lacks is unknown, and a
//! value must have the type that it has there. Only `[runtime.handlers]` has names of the user's own.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use super::{Error, NriValidator};

/// The commented default file.
pub(super) const DEFAULT: &str = include_str!("default.toml");

const HANDLERS: &str = "runtime.handlers";

/// A file's content: every key has a value, but nothing is checked yet beyond its type.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) version: i64,
    pub(super) root: String,
    pub(super) state: String,
    pub(super) grpc: RawGrpc,
    pub(super) streaming: RawStreaming,
    pub(super) network: RawNetwork,
    pub(super) images: RawImages,
    pub(super) runtime: RawRuntime,
    pub(super) nri: RawNri,
    pub(super) metrics: RawMetrics,
    pub(super) tracing: RawTracing,
    pub(super) log: RawLog,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGrpc {
    pub(super) socket: String,
    pub(super) gid: i64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStreaming {
    pub(super) address: String,
    pub(super) tls_cert: String,
    pub(super) tls_key: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNetwork {
    pub(super) conf_dir: String,
    pub(super) bin_dirs: Vec<String>,
    pub(super) timeout: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawImages {
    pub(super) hosts_dir: String,
    pub(super) registries_conf: String,
    pub(super) auth_file: String,
    pub(super) policy: String,
    pub(super) insecure_registries: Vec<String>,
    pub(super) max_parallel_layers: i64,
    pub(super) stall_timeout: String,
    pub(super) pull_timeout: String,
    pub(super) max_layer_size: String,
    pub(super) layer_format: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRuntime {
    pub(super) default: String,
    pub(super) cgroup_driver: String,
    pub(super) shim: String,
    pub(super) timeout: String,
    pub(super) exec_drain: String,
    pub(super) exec_output_limit: String,
    pub(super) pids_limit: i64,
    pub(super) cdi_spec_dirs: Vec<String>,
    pub(super) device_ownership_from_security_context: bool,
    pub(super) blockio_config: String,
    pub(super) handlers: BTreeMap<String, RawHandler>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawHandler {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shim: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) options: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sandbox: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) privileged_without_host_devices: Option<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNri {
    pub(super) enabled: bool,
    pub(super) socket: String,
    pub(super) plugin_dir: String,
    pub(super) conf_dir: String,
    pub(super) disable_connections: bool,
    pub(super) registration_timeout: String,
    pub(super) request_timeout: String,
    pub(super) plugin_timeouts: Vec<String>,
    pub(super) validator: NriValidator,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMetrics {
    pub(super) address: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTracing {
    pub(super) endpoint: String,
    pub(super) samples_per_million: i64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLog {
    pub(super) level: String,
    pub(super) format: String,
}

/// Where a key was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    file: Option<PathBuf>,
    line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{}", file.display(), self.line),
            None => f.write_str("built-in default"),
        }
    }
}

/// The merged files.
pub(super) struct Layers {
    merged: Table,
    /// By dotted key; a key that is not here has its default.
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    /// The defaults alone.
    pub(super) fn defaults() -> Self {
        let merged = DEFAULT.parse().expect("a test parses the built-in defaults");
        Self { merged, origins: BTreeMap::new() }
    }

    /// Adds `file` if it exists; whether it does.
    pub(super) fn add_file(&mut self, file: &Path) -> Result<bool, Error> {
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(Error::Read { file: file.into(), source }),
        };
        self.add(&text, file)?;
        Ok(true)
    }

    /// Adds the `*.toml` of a directory, in order of name. No directory: nothing to add.
    pub(super) fn add_dir(&mut self, dir: &Path) -> Result<(), Error> {
        let read = |source| Error::Read { file: dir.into(), source };
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(read(source)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let file = entry.map_err(read)?.path();
            let hidden = file.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            if !hidden && file.extension().is_some_and(|e| e == "toml") {
                files.push(file);
            }
        }
        files.sort();
        for file in files {
            // A dangling link is a mistake, not an absent file.
            if !self.add_file(&file)? {
                return Err(Error::Read { file, source: io::ErrorKind::NotFound.into() });
            }
        }
        Ok(())
    }

    /// Adds a file's text over what is there.
    pub(super) fn add(&mut self, text: &str, file: &Path) -> Result<(), Error> {
        let syntax = |e: toml::de::Error| Error::Syntax {
            at: Origin { file: Some(file.into()), line: line_of(text, e.span()) },
            problem: e.message().replace('\n', ", "),
        };
        // Twice: the spanned tree knows lines, the plain one is what is merged.
        let spanned = DeTable::parse(text).map_err(syntax)?;
        let table: Table = text.parse().map_err(syntax)?;
        let schema: Table = DEFAULT.parse().expect("a test parses the built-in defaults");
        let mut check = Check { text, file, origins: &mut self.origins };
        check.table("", spanned.get_ref(), &schema)?;
        merge(&mut self.merged, table, "");
        Ok(())
    }

    /// Where `key` was set.
    pub(super) fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin { file: None, line: 0 })
    }

    /// The merged content.
    pub(super) fn raw(&self) -> RawConfig {
        self.merged.clone().try_into().expect("every layer was checked against the defaults")
    }
}

/// Over `base`, key by key. A handler's keys are one choice, so a later file that makes it replaces
/// the earlier choice whole.
fn merge(base: &mut Table, over: Table, prefix: &str) {
    for (name, value) in over {
        let key = join(prefix, &name);
        match (base.get_mut(&name), value) {
            (Some(Value::Table(old)), Value::Table(new)) if prefix != HANDLERS => {
                merge(old, new, &key);
            }
            (Some(old), new) => *old = new,
            (None, new) => {
                base.insert(name, new);
            }
        }
    }
}

struct Check<'a> {
    text: &'a str,
    file: &'a Path,
    origins: &'a mut BTreeMap<String, Origin>,
}

impl Check<'_> {
    fn table(&mut self, prefix: &str, table: &DeTable<'_>, schema: &Table) -> Result<(), Error> {
        for (name, value) in table {
            let key = join(prefix, name.get_ref());
            let at = Origin {
                file: Some(self.file.into()),
                line: line_of(self.text, Some(name.span())),
            };
            let Some(expected) = schema.get(name.get_ref().as_ref()) else {
                let nearest = nearest(&key, prefix, schema);
                return Err(Error::UnknownKey { key, at, nearest });
            };
            self.value(&key, at, value, expected)?;
        }
        Ok(())
    }

    fn value(
        &mut self,
        key: &str,
        at: Origin,
        value: &Spanned<DeValue<'_>>,
        expected: &Value,
    ) -> Result<(), Error> {
        let value = value.get_ref();
        match (value, expected) {
            (DeValue::Table(handlers), Value::Table(_)) if key == HANDLERS => {
                return self.handlers(handlers);
            }
            (DeValue::Table(table), Value::Table(schema)) => {
                return self.table(key, table, schema);
            }
            // Every list of ours is a list of strings.
            (DeValue::Array(items), Value::Array(_))
                if items.iter().all(|i| i.get_ref().is_str()) => {}
            (DeValue::String(_), Value::String(_))
            | (DeValue::Integer(_), Value::Integer(_))
            | (DeValue::Boolean(_), Value::Boolean(_)) => {}
            _ => {
                return Err(Error::WrongType {
                    key: key.into(),
                    at,
                    found: kind(value.type_str()),
                    expected: kind(expected.type_str()),
                });
            }
        }
        self.origins.insert(key.into(), at);
        Ok(())
    }

    fn handlers(&mut self, handlers: &DeTable<'_>) -> Result<(), Error> {
        let mut schema: Table = ["path", "shim", "options", "sandbox"]
            .into_iter()
            .map(|name| (name.to_owned(), Value::String(String::new())))
            .collect();
        schema.insert("privileged_without_host_devices".to_owned(), Value::Boolean(false));
        for (name, handler) in handlers {
            let key = join(HANDLERS, name.get_ref());
            let at = Origin {
                file: Some(self.file.into()),
                line: line_of(self.text, Some(name.span())),
            };
            self.value(&key, at.clone(), handler, &Value::Table(schema.clone()))?;
            self.origins.insert(key, at);
        }
        Ok(())
    }
}

fn kind(toml: &str) -> &'static str {
    match toml {
        "table" => "a table",
        "array" => "a list of strings",
        "string" => "a string",
        "integer" => "a whole number",
        "boolean" => "true or false",
        "float" => "a fraction",
        _ => "a date",
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn line_of(text: &str, span: Option<std::ops::Range<usize>>) -> usize {
    let end = span.map_or(0, |s| s.start).min(text.len());
    1 + text.as_bytes()[..end].iter().filter(|b| **b == b'\n').count()
}

/// The valid key that was most likely meant: one of the same table that is spelt alike, else one of
/// that very name elsewhere (a key in the wrong table), else any that is spelt alike.
fn nearest(key: &str, prefix: &str, siblings: &Table) -> Option<String> {
    let alike = |a: &str, b: &str| strsim::normalized_damerau_levenshtein(a, b);
    let name = key.rsplit('.').next().unwrap_or(key);
    let sibling = siblings
        .keys()
        .map(|k| (alike(name, k), join(prefix, k)))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score >= 0.6);
    if let Some((_, key)) = sibling {
        return Some(key);
    }
    let mut all = Vec::new();
    let schema: Table = DEFAULT.parse().expect("a test parses the built-in defaults");
    leaves("", &schema, &mut all);
    all.into_iter()
        .map(|k| (alike(name, k.rsplit('.').next().unwrap_or(&k)).max(alike(key, &k)), k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score >= 0.6)
        .map(|(_, key)| key)
}

/// Every key that has a value, dotted, without handlers (their names are the user's).
pub(super) fn leaves(prefix: &str, table: &Table, out: &mut Vec<String>) {
    for (name, value) in table {
        let key = join(prefix, name);
        match value {
            Value::Table(_) if key == HANDLERS => {}
            Value::Table(inner) => leaves(&key, inner, out),
            _ => out.push(key),
        }
    }
}
