//! What a server that refuses a request wants (RFC 9110 section 11.6.1).

use hyper::header::{self, HeaderMap};

/// What a 401 asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The strongest of RFC 9110's challenges that we know: Bearer, else Basic.
    pub(super) fn parse(headers: &HeaderMap) -> Option<Self> {
        let mut found = None;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let Ok(mut text) = value.to_str() else { continue };
            while let Some((scheme, parameters, rest)) = challenge(text) {
                if scheme.eq_ignore_ascii_case("bearer") {
                    let get = |name: &str| {
                        let found = parameters.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.clone())
                    };
                    if let Some(realm) = get("realm") {
                        return Some(Challenge::Bearer {
                            realm,
                            service: get("service"),
                            scope: get("scope"),
                        });
                    }
                } else if scheme.eq_ignore_ascii_case("basic") {
                    found = Some(Challenge::Basic);
                }
                text = rest;
            }
        }
        found
    }
}

type Parameters = Vec<(String, String)>;

/// The first challenge of a header's value, and what follows it.
fn challenge(text: &str) -> Option<(&str, Parameters, &str)> {
    let text = text.trim_start_matches([' ', ',', '\t']);
    let end = text.find([' ', ',']).unwrap_or(text.len());
    let (scheme, mut rest) = text.split_at(end);
    if scheme.is_empty() {
        return None;
    }
    let mut parameters = Vec::new();
    loop {
        let next = rest.trim_start_matches([' ', ',', '\t']);
        let Some(equals) = next.find('=') else { return Some((scheme, parameters, "")) };
        let name = next[..equals].trim_end();
        if name.contains([' ', ',']) || name.is_empty() {
            // The name of another scheme comes first.
            return Some((scheme, parameters, next));
        }
        let value = &next[equals + 1..];
        if let Some(quoted) = value.strip_prefix('"') {
            let mut text = String::new();
            let mut characters = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, character)) = characters.next() {
                match character {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => text.extend(characters.next().map(|(_, c)| c)),
                    other => text.push(other),
                }
            }
            parameters.push((name.to_owned(), text));
            rest = &quoted[end..];
        } else {
            let end = value.find([',', ' ']).unwrap_or(value.len());
            parameters.push((name.to_owned(), value[..end].to_owned()));
            rest = &value[end..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|v| (header::WWW_AUTHENTICATE, v.parse().unwrap())).collect()
    }

    #[test]
    fn challenges_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(Into::into),
                scope: scope.map(Into::into),
            })
        };
        for (values, want) in [
            (&["Basic realm=\"x\""][..], Some(Challenge::Basic)),
            (
                &["Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a/b:pull,push\""],
                bearer("https://a/t", Some("s"), Some("repository:a/b:pull,push")),
            ),
            (&["Basic realm=\"x\", Bearer realm=\"https://a\""], bearer("https://a", None, None)),
            (
                &["Negotiate", "bearer Realm=https://a , service=s"],
                bearer("https://a", Some("s"), None),
            ),
            (&["Bearer realm=\"a\\\"b\""], bearer("a\"b", None, None)),
            (&["Bearer service=\"x\""], None),
            (&["Negotiate"], None),
            (&[""], None),
            (&["Bearer realm=\"unterminated"], bearer("unterminated", None, None)),
        ] {
            assert_eq!(Challenge::parse(&headers(values)), want, "{values:?}");
        }
    }
}
