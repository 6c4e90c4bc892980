//! Reads specs and processes from JSON.
//!
//! A capability that is not known is passed over, as other runtimes do: clients list those of their
//! own time. Two flags of the scheduler are known to the types under other names than the
//! specification's. Everything else must be what the specification says.

use oci_spec::runtime::{Capability, Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads a config.json.
///
/// # Errors
/// Where it is no spec, and what was expected there.
pub fn parse_spec(json: &[u8]) -> Result<Spec, serde_json::Error> {
    parse(json, |spec| spec.get_mut("process"))
}

/// Reads a process of a spec.
///
/// # Errors
/// Where it is no process, and what was expected there.
pub fn parse_process(json: &[u8]) -> Result<Process, serde_json::Error> {
    parse(json, |process| Some(process))
}

fn parse<T: DeserializeOwned>(
    json: &[u8],
    process: fn(&mut Value) -> Option<&mut Value>,
) -> Result<T, serde_json::Error> {
    // This way first: its errors say where in the text.
    let error = match serde_json::from_slice(json) {
        Ok(parsed) => return Ok(parsed),
        Err(error) => error,
    };
    let Ok(mut value) = serde_json::from_slice(json) else {
        return Err(error);
    };
    if let Some(process) = process(&mut value) {
        drop_unknown_capabilities(process);
        rename_scheduler_flags(process);
    }
    serde_json::from_value(value).map_err(|_| error)
}

fn drop_unknown_capabilities(process: &mut Value) {
    let sets = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(serde_json::Map::values_mut) {
        if let Some(names) = set.as_array_mut() {
            names.retain(|name| serde_json::from_value::<Capability>(name.clone()).is_ok());
        }
    }
}

fn rename_scheduler_flags(process: &mut Value) {
    let flags = process.pointer_mut("/scheduler/flags");
    for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(capabilities: &str) -> String {
        format!(
            r#"{{"user":{{"uid":0,"gid":0}},"cwd":"/","capabilities":{{"bounding":{capabilities}}}}}"#
        )
    }

    #[test]
    fn what_is_no_process_is_refused_with_its_place() {
        for (text, word) in [
            ("", "EOF"),
            ("[]", "line 1"),
            (r#"{"user":{"uid":-1,"gid":0},"cwd":"/"}"#, "column"),
            (&process("7"), "column"),
        ] {
            let error = parse_process(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let spec = format!(r#"{{"ociVersion":1,"process":{}}}"#, process("[]"));
        assert!(parse_spec(spec.as_bytes()).is_err());
    }

    #[test]
    fn all_flags_of_the_scheduler_are_read() {
        let flags = r#"["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN","SCHED_FLAG_RECLAIM"]"#;
        let text = format!(
            r#"{{"user":{{"uid":0,"gid":0}},"cwd":"/",
                "scheduler":{{"policy":"SCHED_DEADLINE","flags":{flags}}}}}"#
        );
        assert!(parse_process(text.as_bytes()).is_ok());
    }

    #[test]
    fn unknown_capability_is_passed_over() {
        let text = process(r#"["CAP_CHOWN","CAP_FLY"]"#);
        let parsed = parse_process(text.as_bytes()).unwrap();
        let sets = parsed.capabilities().clone().unwrap();
        assert_eq!(sets.bounding().as_ref().map(|set| set.len()), Some(1));
        let spec = format!(r#"{{"ociVersion":"1.2.0","process":{text}}}"#);
        assert!(parse_spec(spec.as_bytes()).is_ok());
    }
}
