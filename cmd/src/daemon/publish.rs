//! `holdfastd --address ADDRESS publish --topic TOPIC --namespace NAMESPACE`, with an event
//! (`google.protobuf.Any`) on stdin.
//!
//! containerd's shim contract gives each shim a `-publish-binary` to run for an event when it has no
//! connection of its own. Shims of ours and current ones of others do have one; this is for old ones.

use std::{
    env,
    io::{self, Read as _},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_protos::shim::{
    api::ForwardRequest,
    protobuf::{
        Message as _, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim_async::{Client, EventsClient},
    ttrpc,
};

/// The shim waits for us, and retries or gives up by itself.
const DEADLINE: Duration = Duration::from_secs(5);

/// Events are some hundred bytes; ttrpc's own limit for a message is 4 MiB.
const MAX_EVENT: u64 = 4 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// "/tasks/exit" and the like
    #[arg(long)]
    topic: String,
    /// containerd's namespace
    #[arg(long)]
    namespace: String,
}

/// Forwards the event on stdin. `address` is what the shim was given as `-address`; the shim's
/// environment has the ttrpc socket itself.
pub(super) fn run(args: Args, address: Option<String>) -> Result<()> {
    let Some(address) = env::var("TTRPC_ADDRESS").ok().filter(|a| !a.is_empty()).or(address) else {
        bail!("publish needs --address or TTRPC_ADDRESS");
    };
    let mut bytes = Vec::new();
    io::stdin().take(MAX_EVENT + 1).read_to_end(&mut bytes).context("read the event from stdin")?;
    ensure!(bytes.len() as u64 <= MAX_EVENT, "the event on stdin has more than {MAX_EVENT} bytes");
    let event = Any::parse_from_bytes(&bytes).context("the event on stdin is no protobuf Any")?;
    ensure!(!event.type_url.is_empty(), "the event on stdin has no type");

    let mut request = ForwardRequest::new();
    let envelope = request.envelope.mut_or_insert_default();
    envelope.timestamp = MessageField::some(Timestamp::from(SystemTime::now()));
    envelope.namespace = args.namespace;
    envelope.topic = args.topic;
    envelope.event = MessageField::some(event);

    let socket = match address.strip_prefix("unix://") {
        Some(_) => address,
        None => format!("unix://{address}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the tokio runtime")?;
    runtime.block_on(async {
        let forward = async {
            let client =
                Client::connect(&socket).await.with_context(|| format!("connect to {socket}"))?;
            let context = ttrpc::context::with_duration(DEADLINE);
            EventsClient::new(client)
                .forward(context, &request)
                .await
                .with_context(|| format!("forward the event to {socket}"))
        };
        match tokio::time::timeout(DEADLINE, forward).await {
            Ok(result) => result.map(drop),
            Err(_) => bail!("no answer from {socket} in {} s", DEADLINE.as_secs()),
        }
    })
}
