//! What a container can do to the sockets between its guest and the host.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::ctr::Ctr;
use crate::fifo::{Fifos, Place};
use crate::shim::{Shim, granted};

/// Execs beside the one that is in the way.
const EXECS: u32 = 20;

/// A process without any rights that takes every vsock port it can get, and connects to the agent's
/// all the time, gets no stream of another and keeps none from its way.
pub(super) fn streams_out_of_reach(ctr: &Ctr) -> Result<()> {
    let place = Place::make("vsock")?;
    fs::copy("/share/husk-fscheck", place.at("squat")).context("cannot copy the program")?;
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:ro",
        place.path.display()
    );
    ctr.detach(&["--mount", &mount], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;

    let (fifos, streams) = Fifos::make(&place, "squat")?;
    let (said, writer) = (fifos.stdout.reader()?, fifos.stdin.writer()?);
    let complained = fifos.stderr.reader()?;
    let process = serde_json::json!({
        "user": {"uid": 65534, "gid": 65534},
        "args": ["/mnt/squat", "--squat"],
        "cwd": "/",
        "noNewPrivileges": true,
    });
    granted(shim.exec_json("squat", &streams, &process.to_string()))?;
    granted(shim.start("squat"))?;
    let has = said.line()?;
    ensure!(
        has.ends_with("not [1025]"),
        "of the ports it should not have it says {has:?}"
    );

    for number in 0..EXECS {
        exec(&shim, &place, number).with_context(|| format!("exec {number}, while one squats"))?;
    }
    drop(writer);
    granted(shim.close_stdin("squat"))?;
    let status = granted(shim.wait("squat"))?.exit_status();
    let rest = [said.rest()?, complained.rest()?].concat();
    let rest = String::from_utf8_lossy(&rest);
    granted(shim.delete("squat"))?;
    let words: Vec<_> = rest.split_whitespace().collect();
    let ["tried", tried, "connected", connected] = words[..] else {
        anyhow::bail!("it ended with {status} and says {rest:?}");
    };
    let tried: u64 = tried.parse()?;
    ensure!(
        status == 0 && tried > u64::from(EXECS) && connected == "0",
        "it ended with {status} and says {rest:?}"
    );
    ctr.bury();
    Ok(())
}

/// One exec, with all three streams.
fn exec(shim: &Shim, place: &Place, number: u32) -> Result<()> {
    let name = format!("e{number}");
    let (fifos, streams) = Fifos::make(place, &name)?;
    let (said, complained) = (fifos.stdout.reader()?, fifos.stderr.reader()?);
    let script = "read line; echo out $line; echo err $line >&2";
    granted(shim.exec(&name, &streams, &["sh", "-c", script]))?;
    granted(shim.start(&name))?;
    fifos
        .stdin
        .writer()?
        .write(format!("{number}\n").as_bytes())?;
    let status = granted(shim.wait(&name))?.exit_status();
    granted(shim.delete(&name))?;
    let texts =
        [said.rest()?, complained.rest()?].map(|text| String::from_utf8_lossy(&text).into_owned());
    ensure!(
        status == 0 && texts == [format!("out {number}\n"), format!("err {number}\n")],
        "it ended with {status} and said {texts:?}"
    );
    Ok(())
}
