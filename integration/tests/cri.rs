//! The whole of the CRI is there: every RPC of its definition is answered by something that reads the
//! request.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::Node;
use tonic::{
    Code, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};

/// The interface as it is compiled into daemon and client.
const DEFINITION: &str = include_str!("../../protos/proto/cri.proto");

/// Services and RPCs of the CRI of Kubernetes 1.37.
const RPCS: usize = 43;

/// Messages as bytes: an empty one is a request of any type with nothing set.
#[derive(Clone, Copy, Default)]
struct Bytes;

impl Codec for Bytes {
    type Encode = ();
    type Decode = usize;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = ();
    type Error = Status;

    fn encode(&mut self, (): (), _: &mut EncodeBuf<'_>) -> Result<(), Status> {
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = usize;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<usize>, Status> {
        let length = hyper::body::Buf::remaining(message);
        hyper::body::Buf::advance(message, length);
        Ok(Some(length))
    }
}

/// Paths of all RPCs that a definition has.
fn paths(definition: &str) -> Vec<String> {
    let mut service = "";
    let mut paths = Vec::new();
    for line in definition.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("service ") {
            service = name.trim_end_matches('{').trim();
        }
        if let Some(name) = line.strip_prefix("rpc ").and_then(|rest| rest.split('(').next()) {
            paths.push(format!("/runtime.v1.{service}/{name}"));
        }
    }
    paths
}

/// How a request with nothing set is answered. A stream has been answered when it begins.
async fn ask(node: &Node, path: &str) -> Result<Code> {
    let mut client = tonic::client::Grpc::new(node.cri().channel());
    client.ready().await?;
    let path: PathAndQuery = path.parse()?;
    let answer = client.server_streaming(tonic::Request::new(()), path.clone(), Bytes);
    let answer = tokio::time::timeout(Duration::from_secs(20), answer);
    let mut stream = match answer.await.with_context(|| format!("{path} does not answer"))? {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Ok(status.code()),
    };
    // The first message, if there is one soon: an event is a long time coming.
    match tokio::time::timeout(Duration::from_millis(300), stream.message()).await {
        Ok(Err(status)) => Ok(status.code()),
        Ok(Ok(_)) | Err(_) => Ok(Code::Ok),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_is_answered_for_real() -> Result<()> {
    let node = Node::start().await?;
    let paths = paths(DEFINITION);
    ensure!(paths.iter().collect::<BTreeSet<_>>().len() == RPCS, "{paths:?}");
    let before = node.inventory();
    for path in &paths {
        let code = ask(&node, path).await?;
        // What needs a name says so, or finds nothing; the rest has an answer.
        ensure!(
            matches!(code, Code::Ok | Code::InvalidArgument | Code::NotFound),
            "{path} answers {code:?}"
        );
    }
    // The question is a real one: what is not there is told apart.
    let missing = ask(&node, "/runtime.v1.RuntimeService/MakeCoffee").await?;
    assert_eq!(missing, Code::Unimplemented);
    node.nothing_left_since(&before).await?;
    node.finish().await
}
