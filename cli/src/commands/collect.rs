//! `clutch collect`.

use std::process::ExitCode;

use anyhow::Result;
use clutch_client::Client;
use clutch_client_maintenance::collector::{CollectOptions, Collected, collect};

use crate::{
    args::CollectArgs,
    output::{self, talk},
};

pub(crate) async fn run(client: &Client, args: &CollectArgs) -> Result<ExitCode> {
    let options = CollectOptions { requests_per_s: args.requests_per_s, ..CollectOptions::default() };
    loop {
        match collect(client, options).await {
            Ok(done) => {
                show(&done, args.json)?;
                if args.once {
                    return Ok(if done.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
                }
            }
            Err(error) if args.once => return Err(error.into()),
            Err(error) => talk!("clutch: {error}; the next pass tries again"),
        }
        client.runtime().clock.sleep(crate::args::seconds(args.every_s)).await;
    }
}

fn show(done: &Collected, json: bool) -> Result<()> {
    if json {
        return output::json(done);
    }
    output::line(format!(
        "forgot {} past entries with {} files, {} past contents, {} directories",
        done.past_edges, done.files, done.past_contents, done.directories
    ))?;
    output::line(format!(
        "took {} contents apart, erased {} blocks of {} spans",
        done.contents, done.blocks, done.spans
    ))?;
    if done.too_early > 0 {
        output::line(format!(
            "{} spans must wait until no write of their blocks can come any more",
            done.too_early
        ))?;
    }
    for failure in &done.failures {
        talk!("clutch: {failure}");
    }
    Ok(())
}
