//! Identifiers, parsed once at the edge. A value of one of these types is valid by construction.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is not an identifier.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {text:?} is not valid: {rule}")]
pub struct Invalid {
    what: &'static str,
    text: String,
    rule: &'static str,
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// A new identifier: 32 random bytes as 64 lower-case hex digits.
            pub fn random() -> Self {
                Self(hex::encode(rand::random::<[u8; 32]>()).into())
            }
            /// The 64 hex digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }
            /// The first 13 digits, as people read them in tables.
            pub fn short(&self) -> &str {
                &self.0[..13]
            }
        }
        impl FromStr for $name {
            type Err = Invalid;
            fn from_str(text: &str) -> Result<Self, Invalid> {
                let ok = text.len() == 64
                    && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                if !ok {
                    return Err(Invalid {
                        what: $what,
                        text: text.chars().take(80).collect(),
                        rule: "it must be 64 lower-case hex digits",
                    });
                }
                Ok(Self(text.into()))
            }
        }
        impl TryFrom<String> for $name {
            type Error = Invalid;
            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                std::path::Path::new(&*self.0)
            }
        }
    };
}

hex_id!(
    /// A pod ("sandbox" on the wire).
    PodId,
    "pod id"
);
hex_id!(
    /// A container.
    ContainerId,
    "container id"
);

/// A content digest. Only sha256 is accepted: it is what every registry serves.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// From the 32 bytes of a finished SHA-256.
    pub fn from_sha256(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// The hash as 64 hex digits, without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}
impl FromStr for Digest {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid {
            what: "digest",
            text: text.chars().take(100).collect(),
            rule: "it must be sha256: and 64 lower-case hex digits",
        };
        let hash = text.strip_prefix("sha256:").ok_or_else(invalid)?;
        if hash.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(hash, &mut bytes).map_err(|_| invalid())?;
        Ok(Self(bytes))
    }
}
impl TryFrom<String> for Digest {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}
impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_refuse_everything_else() {
        let id = PodId::random();
        assert_eq!(id.as_str().parse::<PodId>(), Ok(id.clone()));
        for bad in ["", "abc", "../../etc", &"G".repeat(64), &"A".repeat(64), &"a".repeat(65)] {
            assert!(bad.parse::<PodId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_are_sha256_in_lower_case() {
        let text = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(text.parse::<Digest>().unwrap().to_string(), text);
        for bad in
            ["sha512:00", "sha256:", &format!("sha256:{}", "0A".repeat(32)), &"0a".repeat(32)]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
