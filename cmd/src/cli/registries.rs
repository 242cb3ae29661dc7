//! `config registries`: which servers are asked for an image, in order, and who says so.

use anyhow::Result;
use holdfast_protos::images as wire;
use serde_json::json;

use super::{
    Client,
    args::{Registries, Shown},
    table::{Table, printable},
    wire as output,
};

/// `holdfast config registries`
pub(super) async fn registries(client: &mut Client, args: Registries) -> Result<u8> {
    let mut service = client.admin_images.clone();
    let request = wire::ResolveRequest { reference: args.image };
    let answer = client.quick(service.resolve(request)).await?;
    match args.output {
        Shown::Text => output::write(&text(&answer))?,
        Shown::Json => output::print(&document(&answer), super::args::Document::Json)?,
        Shown::Yaml => output::print(&document(&answer), super::args::Document::Yaml)?,
    }
    // Something is there that could be asked.
    Ok(u8::from(answer.names.iter().all(|name| !name.error.is_empty())))
}

fn document(answer: &wire::ResolveResponse) -> serde_json::Value {
    let names = answer.names.iter().map(|name| {
        let endpoints = name.endpoints.iter().map(|e| {
            json!({
                "url": e.url, "mirror": e.mirror, "resolve": e.resolve, "pull": e.pull,
                "push": e.push, "unverified": e.unverified, "fallback": e.fallback,
                "credentials": e.credentials, "file": e.file,
            })
        });
        let endpoints: Vec<_> = endpoints.collect();
        json!({"reference": name.reference, "endpoints": endpoints, "error": name.error})
    });
    json!({"names": names.collect::<Vec<_>>()})
}

fn text(answer: &wire::ResolveResponse) -> String {
    let mut out = String::new();
    for (index, name) in answer.names.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        out += &format!("{}\n", printable(&name.reference));
        if !name.error.is_empty() {
            out += &format!("  not asked for: {}\n", printable(&name.error));
            continue;
        }
        let mut table = Table::new(["  ENDPOINT", "KIND", "FOR", "TLS", "FROM"]);
        for endpoint in &name.endpoints {
            let kind = if endpoint.mirror { "mirror" } else { "registry" };
            let what = [
                (endpoint.resolve, "resolve"),
                (endpoint.pull, "pull"),
                (endpoint.push, "push"),
                (endpoint.credentials, "credentials"),
            ];
            let what: Vec<&str> = what.iter().filter(|(is, _)| *is).map(|(_, w)| *w).collect();
            let tls = match (endpoint.url.starts_with("http:"), endpoint.unverified) {
                (true, _) => "none",
                (false, true) => "unverified",
                (false, false) => "verified",
            };
            let tls = if endpoint.fallback { format!("{tls}, if https fails") } else { tls.into() };
            let from = match endpoint.file.as_str() {
                "" => "the reference".to_owned(),
                file => file.to_owned(),
            };
            table.row([format!("  {}", endpoint.url), kind.to_owned(), what.join(","), tls, from]);
        }
        out += &table.render();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_a_table_for_each_name() {
        let endpoint = wire::Endpoint {
            url: "https://mirror.example/v2/a".into(),
            mirror: true,
            pull: true,
            file: "/etc/registries.conf".into(),
            ..Default::default()
        };
        let plain = wire::Endpoint {
            url: "http://127.0.0.1:5000/v2/a".into(),
            resolve: true,
            pull: true,
            unverified: true,
            fallback: true,
            credentials: true,
            ..Default::default()
        };
        let answer = wire::ResolveResponse {
            names: vec![
                wire::ResolvedName {
                    reference: "r.example/a:1".into(),
                    endpoints: vec![endpoint, plain],
                    error: String::new(),
                },
                wire::ResolvedName {
                    reference: "b.example/a:1".into(),
                    endpoints: Vec::new(),
                    error: "it is blocked".into(),
                },
            ],
        };
        assert_eq!(
            text(&answer),
            "r.example/a:1\n  \
             ENDPOINT                      KIND       FOR                        TLS                    FROM\n  \
             https://mirror.example/v2/a   mirror     pull                       verified               /etc/registries.conf\n  \
             http://127.0.0.1:5000/v2/a    registry   resolve,pull,credentials   none, if https fails   the reference\n\
             \n\
             b.example/a:1\n  not asked for: it is blocked\n"
        );
    }
}
