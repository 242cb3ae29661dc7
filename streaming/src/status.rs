//! The outcome of an exec or attach as the client learns it: a `metav1.Status` (protocol v4 and later)
//! or a plain text (before).

use serde::{Deserialize, Serialize};

/// The part of Kubernetes' `metav1.Status` that remotecommand uses.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    metadata: Metadata,
    status: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

/// Always empty, and always there.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Metadata {}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Cause {
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    message: String,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The process exited with a code.
    Exited(i32),
    /// It could not be run, or the connection to it broke.
    Failed(String),
}

impl Outcome {
    /// As protocol v4 has it.
    pub(crate) fn json(&self) -> Vec<u8> {
        let failure = |message, reason: &str, cause, code| Status {
            status: "Failure".into(),
            message,
            reason: reason.into(),
            details: Some(Details { causes: vec![cause] }),
            code,
            ..Status::default()
        };
        let status = match self {
            Outcome::Exited(0) => Status { status: "Success".into(), ..Status::default() },
            Outcome::Exited(code) => {
                let cause = Cause { reason: "ExitCode".into(), message: code.to_string() };
                failure(exited(*code), "NonZeroExitCode", cause, None)
            }
            Outcome::Failed(text) => {
                let cause = Cause { reason: String::new(), message: text.clone() };
                failure(
                    format!("Internal error occurred: {text}"),
                    "InternalError",
                    cause,
                    Some(500),
                )
            }
        };
        serde_json::to_vec(&status).expect("a Status has string keys only")
    }

    /// As protocols before v4 have it: nothing when all went well.
    pub(crate) fn text(&self) -> Vec<u8> {
        match self {
            Outcome::Exited(0) => Vec::new(),
            Outcome::Exited(code) => exited(*code).into(),
            Outcome::Failed(text) => text.clone().into(),
        }
    }

    /// What a Status of a server (ours or another) says.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let status: Status = serde_json::from_slice(json)?;
        if status.status == "Success" {
            return Ok(Outcome::Exited(0));
        }
        let causes = status.details.map(|details| details.causes).unwrap_or_default();
        let code = causes.iter().find(|cause| cause.reason == "ExitCode");
        match code.and_then(|cause| cause.message.parse().ok()) {
            Some(code) if status.reason == "NonZeroExitCode" => Ok(Outcome::Exited(code)),
            _ => Ok(Outcome::Failed(status.message)),
        }
    }
}

fn exited(code: i32) -> String {
    format!("command terminated with exit code {code}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(outcome: &Outcome) -> String {
        String::from_utf8(outcome.json()).unwrap()
    }

    #[test]
    fn the_json_is_what_clients_expect() {
        assert_eq!(text(&Outcome::Exited(0)), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(
            text(&Outcome::Exited(42)),
            r#"{"metadata":{},"status":"Failure","message":"command terminated with exit code 42","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"42"}]}}"#
        );
        assert_eq!(
            text(&Outcome::Failed("no such container".into())),
            r#"{"metadata":{},"status":"Failure","message":"Internal error occurred: no such container","reason":"InternalError","details":{"causes":[{"message":"no such container"}]},"code":500}"#
        );
    }

    #[test]
    fn an_outcome_survives_the_way_to_the_client() {
        for code in [0, 1, 42, 137, 255] {
            assert_eq!(
                Outcome::parse(&Outcome::Exited(code).json()).unwrap(),
                Outcome::Exited(code)
            );
        }
        let failed = Outcome::parse(&Outcome::Failed("gone".into()).json()).unwrap();
        assert_eq!(failed, Outcome::Failed("Internal error occurred: gone".into()));
        assert!(Outcome::parse(b"not json").is_err());
    }
}
