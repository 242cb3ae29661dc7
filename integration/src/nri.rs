//! An NRI plugin for tests, at both ends: the program (`holdfast-testplugin`), and a test's handle to it.
//!
//! What the plugin answers stands in a file of its directory, which it reads anew for each request, so
//! that a test can change it at any time:
//!
//! ```text
//! script.json    {"events": MASK, "answers": {"CreateContainer": [ANSWER, …], …}}
//! events.jsonl   one line for each request: {"method", "pod", "container", "request"}
//! calls/N.json   an UpdateContainersRequest to be sent; calls/N.answer is what came of it
//! ```
//! An ANSWER has any of "container" and "pod" (names that it is for; without them it is for all), "answer" (the
//! response as proto3 JSON), "error" (a refusal), "sleep" (milliseconds), "hang" and "die" (true). The first
//! that fits counts.

use std::{
    fs,
    io::Write as _,
    os::fd::{FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_daemon::nri::wire::{
    Decoder, Message, PLUGIN, REQUEST, RESPONSE, RUNTIME, Request, Response,
};
use holdfast_protos::nri::DESCRIPTOR_SET;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{Mutex, mpsc},
};

use crate::wait::{Look, eventually};

const PACKAGE: &str = "nri.pkg.api.v1alpha1";

/// How long a test waits for the plugin.
const PATIENCE: Duration = Duration::from_secs(30);

/// The plugin's side: speaks until the connection ends.
///
/// # Errors
/// The connection cannot be made, or something is said that makes no sense.
pub async fn run(args: &[String]) -> Result<()> {
    let pool = DescriptorPool::decode(DESCRIPTOR_SET)?;
    let (stream, dir, identity) = match std::env::var("NRI_PLUGIN_SOCKET") {
        Ok(fd) => {
            let fd: i32 = fd.parse()?;
            #[expect(unsafe_code, reason = "the protocol gives a descriptor by its number")]
            // SAFETY: it was made for this process, which has not touched it yet.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let stream = std::os::unix::net::UnixStream::from(fd);
            stream.set_nonblocking(true)?;
            // Its directory is its configuration.
            (UnixStream::from_std(stream)?, None, (String::new(), String::new()))
        }
        Err(_) => {
            let [socket, dir, index, name] = args else { bail!("SOCKET DIR INDEX NAME") };
            let stream = UnixStream::connect(socket).await?;
            (stream, Some(PathBuf::from(dir)), (index.clone(), name.clone()))
        }
    };
    let (mut read, write) = stream.into_split();
    let plugin = Arc::new(Plugin {
        pool,
        write: Mutex::new(write),
        dir: std::sync::RwLock::new(dir),
        log: std::sync::Mutex::new(()),
    });
    if !plugin.silent() {
        let register = json!({"plugin_name": identity.1, "plugin_idx": identity.0});
        plugin.send(1, "RegisterPlugin", plugin.encode("RegisterPluginRequest", register)?).await?;
    }
    let (answers, mut answered) = mpsc::channel(16);
    let calls = plugin.clone();
    tokio::spawn(async move {
        // The registration's answer.
        let _ = answered.recv().await;
        if let Err(error) = calls.call_when_told(&mut answered).await {
            eprintln!("{error:#}");
        }
    });
    let mut decoder = Decoder::default();
    let mut piece = vec![0; 64 << 10];
    loop {
        let length = read.read(&mut piece).await?;
        if length == 0 {
            return Ok(());
        }
        let mut messages = Vec::new();
        decoder.feed(&piece[..length], |channel, message| messages.push((channel, message)))?;
        for (channel, message) in messages {
            match (channel, message.kind) {
                (PLUGIN, REQUEST) => {
                    let plugin = plugin.clone();
                    tokio::spawn(async move {
                        if let Err(error) = plugin.answer(message).await {
                            eprintln!("{error:#}");
                            std::process::exit(1);
                        }
                    });
                }
                (RUNTIME, RESPONSE) => answers.send(Response::decode(&message.data[..])?).await?,
                _ => bail!("a message without sense: {channel} {message:?}"),
            }
        }
    }
}

struct Plugin {
    pool: DescriptorPool,
    write: Mutex<OwnedWriteHalf>,
    dir: std::sync::RwLock<Option<PathBuf>>,
    log: std::sync::Mutex<()>,
}

impl Plugin {
    fn dir(&self) -> Option<PathBuf> {
        self.dir.read().ok()?.clone()
    }

    fn script(&self) -> Value {
        let text = self.dir().and_then(|dir| fs::read(dir.join("script.json")).ok());
        text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// It connects and says nothing.
    fn silent(&self) -> bool {
        self.script()["silent"] == json!(true)
    }

    fn message(&self, name: &str) -> Result<MessageDescriptor> {
        self.pool.get_message_by_name(&format!("{PACKAGE}.{name}")).context("no such message")
    }

    fn encode(&self, name: &str, json: Value) -> Result<Vec<u8>> {
        let message = DynamicMessage::deserialize(self.message(name)?, json)?;
        Ok(message.encode_to_vec())
    }

    fn decode(&self, name: &str, bytes: &[u8]) -> Result<Value> {
        let message = DynamicMessage::decode(self.message(name)?, bytes)?;
        let options = SerializeOptions::new().use_proto_field_name(true);
        Ok(message.serialize_with_options(serde_json::value::Serializer, &options)?)
    }

    async fn send(&self, stream: u32, method: &str, payload: Vec<u8>) -> Result<()> {
        let request = Request {
            service: format!("{PACKAGE}.Runtime"),
            method: method.into(),
            payload,
            timeout_nano: 0,
        };
        let message = Message { stream, kind: REQUEST, data: request.encode_to_vec() };
        self.write.lock().await.write_all(&message.encode(RUNTIME)?).await?;
        Ok(())
    }

    async fn answer(&self, message: Message) -> Result<()> {
        let request = Request::decode(&message.data[..])?;
        let method = request.method.as_str();
        let name = match method {
            "Shutdown" => "Empty".to_owned(),
            "StateChange" => "StateChangeEvent".to_owned(),
            method => format!("{method}Request"),
        };
        let asked = self.decode(&name, &request.payload)?;
        if method == "Configure" && self.dir().is_none() {
            let config = asked["config"].as_str().unwrap_or_default().trim();
            *self.dir.write().expect("nobody panics") = Some(config.into());
        }
        let script = self.script();
        let of = |what: &str| asked[what]["name"].as_str().unwrap_or_default().to_owned();
        let (pod, container) = (of("pod"), of("container"));
        let line = json!({
            "method": method, "pod": pod, "container": container, "request": asked,
        });
        self.note(&line)?;
        let fits = |answer: &&Value| {
            let is = |what: &str, name: &str| answer.get(what).is_none_or(|wanted| wanted == name);
            is("pod", &pod) && is("container", &container)
        };
        let answers = script["answers"][method].as_array().into_iter().flatten();
        let chosen = answers.clone().find(fits).cloned().unwrap_or_default();
        if chosen["die"] == json!(true) {
            std::process::exit(9);
        }
        if chosen["hang"] == json!(true) {
            std::future::pending::<()>().await;
        }
        if let Some(time) = chosen["sleep"].as_u64() {
            tokio::time::sleep(Duration::from_millis(time)).await;
        }
        let unknown = script["unknown"].as_array().is_some_and(|l| l.contains(&json!(method)));
        let response = match chosen["error"].as_str() {
            _ if unknown => Response::failed(tonic::Code::Unimplemented, "no such method"),
            Some(error) => Response::failed(tonic::Code::Unknown, error),
            None => {
                let mut json = chosen.get("answer").cloned().unwrap_or_else(|| json!({}));
                if method == "Configure" {
                    json["events"] = script.get("events").cloned().unwrap_or(json!(0));
                }
                if method == "Synchronize" && asked["more"] == json!(true) {
                    json = json!({"more": true});
                }
                let name = match method {
                    "Shutdown" | "StateChange" => "Empty".to_owned(),
                    method => format!("{method}Response"),
                };
                Response { status: None, payload: self.encode(&name, json)? }
            }
        };
        let answer =
            Message { stream: message.stream, kind: RESPONSE, data: response.encode_to_vec() };
        self.write.lock().await.write_all(&answer.encode(PLUGIN)?).await?;
        Ok(())
    }

    fn note(&self, line: &Value) -> Result<()> {
        let Some(dir) = self.dir() else { return Ok(()) };
        let _one = self.log.lock().expect("nobody panics");
        let path = dir.join("events.jsonl");
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        Ok(file.write_all(format!("{line}\n").as_bytes())?)
    }

    async fn call_when_told(&self, answers: &mut mpsc::Receiver<Response>) -> Result<()> {
        for number in 0u32.. {
            let (call, answer) = loop {
                if let Some(dir) = self.dir() {
                    let dir = dir.join("calls");
                    let call = dir.join(format!("{number}.json"));
                    if let Ok(text) = fs::read(&call) {
                        break (text, dir.join(format!("{number}.answer")));
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            let request = serde_json::from_slice(&call)?;
            let payload = self.encode("UpdateContainersRequest", request)?;
            self.send(3 + 2 * number, "UpdateContainers", payload).await?;
            let response = answers.recv().await.context("no answer")?;
            let text = match response.status {
                Some(status) => json!({"error": status.message}),
                None => self.decode("UpdateContainersResponse", &response.payload)?,
            };
            let part = answer.with_extension("part");
            fs::write(&part, text.to_string())?;
            fs::rename(part, answer)?;
        }
        Ok(())
    }
}

/// A test's handle to a plugin.
#[derive(Debug)]
pub struct TestPlugin {
    dir: PathBuf,
    child: Option<Child>,
    calls: u32,
}

impl Drop for TestPlugin {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl TestPlugin {
    /// A plugin that is started by the daemon, or later: its directory only. `script` is what it answers.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn prepare(dir: &Path, script: &Value) -> Result<Self> {
        fs::create_dir_all(dir.join("calls"))?;
        let plugin = Self { dir: dir.to_owned(), child: None, calls: 0 };
        plugin.script(script)?;
        Ok(plugin)
    }

    /// Starts one that connects to `socket`, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(
        program: &Path,
        socket: &Path,
        dir: &Path,
        (index, name): (&str, &str),
        script: &Value,
    ) -> Result<Self> {
        let mut plugin = Self::prepare(dir, script)?;
        let child = Command::new(program)
            .args([socket, dir])
            .args([index, name])
            .env_remove("NRI_PLUGIN_SOCKET")
            .stdin(Stdio::null())
            .spawn()
            .context("start the plugin")?;
        plugin.child = Some(child);
        Ok(plugin)
    }

    /// The same, and waits until it is synchronised.
    ///
    /// # Errors
    /// It cannot be started, or is not taken.
    pub async fn connect(
        program: &Path,
        socket: &Path,
        dir: &Path,
        who: (&str, &str),
        script: &Value,
    ) -> Result<Self> {
        let plugin = Self::launch(program, socket, dir, who, script)?;
        plugin.wait_for("Synchronize", |line| line["request"]["more"] != json!(true)).await?;
        Ok(plugin)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Changes what it answers.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn script(&self, script: &Value) -> Result<()> {
        let part = self.dir.join("script.part");
        fs::write(&part, script.to_string())?;
        Ok(fs::rename(part, self.dir.join("script.json"))?)
    }

    /// What it was asked so far.
    pub fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.join("events.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The methods that name that container, in order.
    pub fn of_container(&self, name: &str) -> Vec<String> {
        let lines = self.events().into_iter().filter(|line| line["container"] == name);
        lines.map(|line| line["method"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The methods that name that pod and no container, in order.
    pub fn of_pod(&self, name: &str) -> Vec<String> {
        let lines =
            self.events().into_iter().filter(|line| line["pod"] == name && line["container"] == "");
        lines.map(|line| line["method"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits for a request that is so.
    ///
    /// # Errors
    /// None comes.
    pub async fn wait_for(&self, method: &str, so: impl Fn(&Value) -> bool) -> Result<Value> {
        eventually(PATIENCE, &format!("the plugin to be asked {method}"), async || {
            let events = self.events();
            let found = events.iter().find(|line| line["method"] == method && so(line));
            Ok(match found {
                Some(line) => Look::Done(line.clone()),
                None => {
                    let methods: Vec<_> = events.iter().map(|line| &line["method"]).collect();
                    Look::Not(format!("{methods:?}"))
                }
            })
        })
        .await
    }

    /// Makes it call UpdateContainers; what it is answered.
    ///
    /// # Errors
    /// It is not answered.
    pub async fn update(&mut self, request: &Value) -> Result<Value> {
        let at = |number: u32, kind: &str| self.dir.join("calls").join(format!("{number}.{kind}"));
        let number = self.calls;
        self.calls += 1;
        fs::write(at(number, "part"), request.to_string())?;
        fs::rename(at(number, "part"), at(number, "json"))?;
        let answer = at(number, "answer");
        eventually(PATIENCE, "the plugin to be answered", async || {
            Ok(match fs::read(&answer) {
                Ok(text) => Look::Done(serde_json::from_slice(&text)?),
                Err(error) => Look::Not(error.to_string()),
            })
        })
        .await
    }

    /// Kills it.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        let child = self.child.as_mut().context("not started by the test")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// It goes on.
    pub async fn ended(&mut self) -> Result<()> {
        let child = self.child.as_mut().context("not started by the test")?;
        let mut ended = false;
        eventually(PATIENCE, "the plugin to end", async || {
            ended = child.try_wait()?.is_some();
            Ok(Look::when(ended, || "it runs".into()))
        })
        .await?;
        ensure!(ended);
        Ok(())
    }
}
