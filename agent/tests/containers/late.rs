//! Launches that take too long.

use husk_agent::launch::LaunchError;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};

use super::*;

#[test]
fn container_that_is_too_late_is_undone_and_can_be_made_again() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        // A namespace that the stage can't join before somebody writes to its file.
        let fifo = fixture.directory.join("stuck-namespace");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let mut spec = fixture.spec(&["true"]);
        spec["linux"]["namespaces"][5]["path"] = json!(fifo);
        let streams = fixture.streams();
        let refused = fixture
            .impatient
            .create(
                "late",
                spec.to_string().as_bytes(),
                "/bundle",
                None,
                &streams.request,
            )
            .await
            .unwrap_err();
        assert!(
            matches!(
                refused,
                SandboxError::Launch(LaunchError::Deadline(IMPATIENT))
            ),
            "{refused:?}"
        );
        // Who waits for a writer is a reader already.
        let writer = open(&fifo, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty());
        assert_eq!(writer.unwrap_err(), rustix::io::Errno::NXIO);
        assert!(!fixture.cgroups.join("late").exists());
        assert!(fixture.impatient.container("late").is_err());

        // With patience. A host never uses a port for a second stream.
        let streams = fixture.streams();
        let spec = fixture.spec(&["true"]).to_string();
        let sandbox = &fixture.sandbox;
        sandbox
            .create("late", spec.as_bytes(), "/bundle", None, &streams.request)
            .await?;
        sandbox.start("late", "").await?;
        streams.exchange(b"").await?;
        assert_eq!(sandbox.wait("late", "").await?.status, 0);
        Ok(sandbox.delete("late").await?)
    });
}
