//! Directories' policies.

use anyhow::{Context as _, Result, ensure};
use clutch_client::Client;
use clutch_proto::types::{
    DirectoryPolicy, InlinePolicy, PolicyPart, SnapshotPolicy, SpanClass, SpanClasses, StorageClass,
    StorageClasses, StripePolicy,
};
use serde_json::{Value, json};

use crate::{
    args::{Keep, Part, PolicyCommand},
    output,
    remote::RemotePath,
};

pub(super) async fn run(client: &Client, command: &PolicyCommand) -> Result<()> {
    match command {
        PolicyCommand::Get { path, json } => get(client, path, *json).await,
        PolicyCommand::Set {
            path,
            keep_age,
            keep_versions,
            spans,
            storage,
            cell_size,
            inline_max,
            inherit,
        } => {
            let dir = client.resolve_directory(path).await?;
            let snapshot = match (keep_age, keep_versions) {
                (None, None) => None,
                // The limit that is not named stays as it holds now, from wherever it came.
                (age, versions) => {
                    let now = client.snapshot_policy(dir).await?;
                    Some(SnapshotPolicy {
                        age_ms: age.map_or(now.age_ms, limit),
                        versions: versions.map_or(now.versions, limit),
                    })
                }
            };
            let spans = spans
                .iter()
                .map(|(size_max, data_blocks, parity_blocks)| SpanClass {
                    size_max: *size_max,
                    data_blocks: *data_blocks,
                    parity_blocks: *parity_blocks,
                })
                .collect::<Vec<_>>();
            let storage = storage
                .iter()
                .map(|(size_min, storage_class)| StorageClass {
                    size_min: *size_min,
                    storage_class: *storage_class,
                })
                .collect::<Vec<_>>();
            let policy = DirectoryPolicy {
                snapshot,
                spans: (!spans.is_empty()).then_some(SpanClasses { classes: spans }),
                storage: (!storage.is_empty()).then_some(StorageClasses { classes: storage }),
                stripe: cell_size.map(|cell_size| StripePolicy { cell_size }),
                inline: inline_max.map(|size_max| InlinePolicy { size_max }),
            };
            ensure!(
                policy != DirectoryPolicy::default() || !inherit.is_empty(),
                "nothing to set: say what to keep, spans, storage, a cell size, what lies in the metadata, or what to inherit"
            );
            let inherit: Vec<PolicyPart> = inherit.iter().map(|part| part_of(*part)).collect();
            client.set_policy(dir, policy, &inherit).await.with_context(|| path.to_string())?;
            Ok(())
        }
    }
}

fn limit<T>(keep: Keep<T>) -> Option<T> {
    match keep {
        Keep::AtMost(limit) => Some(limit),
        Keep::All => None,
    }
}

fn part_of(part: Part) -> PolicyPart {
    match part {
        Part::Keep => PolicyPart::Snapshot,
        Part::Spans => PolicyPart::Spans,
        Part::Storage => PolicyPart::Storage,
        Part::CellSize => PolicyPart::Stripe,
        Part::InlineMax => PolicyPart::Inline,
    }
}

fn shown_age(ms: u64) -> String {
    for (unit_ms, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")] {
        if ms >= unit_ms && ms.is_multiple_of(unit_ms) {
            return format!("{}{unit}", ms / unit_ms);
        }
    }
    format!("{ms}ms")
}

async fn get(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
    let dir = client.resolve_directory(path).await?;
    let own = client.stat(dir).await?.policy.unwrap_or_default();
    let holds = client.effective_policy(dir).await?;
    let keep = client.snapshot_policy(dir).await?;
    let write = client.write_policy(dir).await?;
    let spans = write.classes();
    let storage: Vec<(u32, u32)> =
        holds.storage.iter().flat_map(|s| &s.classes).map(|c| (c.size_min, c.storage_class)).collect();
    let from = |is_own: bool, is_set: bool| match (is_own, is_set) {
        (true, _) => "set here",
        (false, true) => "inherited",
        (false, false) => "default",
    };
    let origins = [
        from(own.snapshot.is_some(), holds.snapshot.is_some()),
        from(own.spans.is_some(), holds.spans.is_some()),
        from(own.storage.is_some(), holds.storage.is_some()),
        from(own.stripe.is_some(), holds.stripe.is_some()),
        from(own.inline.is_some(), holds.inline.is_some()),
    ];
    if as_json {
        let spans: Vec<Value> = spans
            .iter()
            .map(|(size, data, parity)| json!({ "size_max": size, "data_blocks": data, "parity_blocks": parity }))
            .collect();
        let storage: Vec<Value> =
            storage.iter().map(|(size, class)| json!({ "size_min": size, "storage_class": class })).collect();
        return output::json(&json!({
            "keep": { "age_ms": keep.age_ms.map(output::number), "versions": keep.versions, "from": origins[0] },
            "spans": { "classes": spans, "from": origins[1] },
            "storage": { "classes": storage, "from": origins[2] },
            "cell_size": { "bytes": write.cell_bytes(), "from": origins[3] },
            "inline": { "size_max": write.inline_bytes(), "from": origins[4] },
        }));
    }
    let age = keep.age_ms.map_or("forever".to_owned(), shown_age);
    let versions = keep.versions.map_or("all".to_owned(), |versions| versions.to_string());
    output::line(format!("keep       age {age}, versions {versions} ({})", origins[0]))?;
    let shown: Vec<String> = spans
        .iter()
        .map(|(size, data, parity)| format!("{data}+{parity} to {}", output::bytes(u64::from(*size))))
        .collect();
    output::line(format!("spans      {} ({})", shown.join(", "), origins[1]))?;
    let shown: Vec<String> = storage
        .iter()
        .map(|(size, class)| format!("class {class} from {}", output::bytes(u64::from(*size))))
        .collect();
    let shown = if shown.is_empty() { "class 0".to_owned() } else { shown.join(", ") };
    output::line(format!("storage    {shown} ({})", origins[2]))?;
    output::line(format!("cell size  {} ({})", output::bytes(u64::from(write.cell_bytes())), origins[3]))?;
    output::line(format!(
        "inline     to {} ({})",
        output::bytes(u64::from(write.inline_bytes())),
        origins[4]
    ))?;
    Ok(())
}
