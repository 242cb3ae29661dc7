//! `upgrade shims`: new code for shims that run.

use anyhow::Result;
use holdfast_protos::admin::{self, upgraded_shim::Outcome};

use super::{
    Client,
    args::UpgradeShims,
    table::{Table, printable, short_id},
    wire as output,
};

/// `holdfast upgrade shims`; 1 when a shim goes on with old code.
pub(super) async fn shims(client: &mut Client, args: UpgradeShims) -> Result<u8> {
    let binary = match args.binary {
        Some(path) => std::path::absolute(path)?.display().to_string(),
        None => String::new(),
    };
    let request = admin::UpgradeShimsRequest { binary, force: args.force };
    // Each shim has a deadline of its own.
    let mut service = client.admin.clone();
    let shims = client.long(service.upgrade_shims(request)).await?.shims;
    let mut table = Table::new(["POD ID", "NAMESPACE", "NAME", "SHIM"]);
    let mut kept = false;
    for shim in &shims {
        let outcome = match shim.outcome() {
            Outcome::Upgraded => "upgraded".to_owned(),
            Outcome::Current => "runs it already".to_owned(),
            Outcome::Kept => {
                kept = true;
                format!("kept as it is: {}", printable(&shim.error))
            }
        };
        table.row([
            short_id(&shim.pod_id).to_owned(),
            printable(&shim.pod_namespace),
            printable(&shim.pod_name),
            outcome,
        ]);
    }
    output::write(&table.render())?;
    Ok(u8::from(kept))
}
