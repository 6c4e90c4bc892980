//! report.html: one file that needs nothing else, for people with any screen, or none.

use std::fmt::Write;

use super::Results;
use super::svg::{self, Ratios, escaped};
use crate::measures::{self, Better, Measure, Section, Target};
use crate::record::{Subject, Trace};
use crate::statistics::short;

const STYLE: &str = "
:root { color-scheme: light dark; --text: #1b1b1b; --back: #fff; --faint: #5c5c5c; --line: #ccc;
  --husk: #0b5cad; --runc: #6a6a6a; --gvisor: #b04a00; --good: #106b21; --bad: #b3001b; }
@media (prefers-color-scheme: dark) { :root { --text: #eaeaea; --back: #161616; --faint: #b0b0b0;
  --line: #484848; --husk: #6cb4ff; --runc: #a8a8a8; --gvisor: #ff9d52; --good: #6fd483;
  --bad: #ff8590; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td small { color: var(--faint); display: block; line-height: 1.1; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: bold; }
svg { width: 100%; height: auto; min-width: 40rem; }
svg text { font: 13px system-ui, sans-serif; fill: var(--text); }
svg .name { text-anchor: end; } svg .scale { text-anchor: middle; fill: var(--faint); }
svg .tick { stroke: var(--line); } svg .one { stroke: var(--text); stroke-dasharray: 4 3; }
svg .husk { fill: var(--husk); } svg .runc { fill: var(--runc); } svg .gvisor { fill: var(--gvisor); }
.key { color: var(--husk); } .key.gvisor { color: var(--gvisor); }
";

const METHOD: &str = "
<p>Starts, files and network were measured in Husk's testbed: an emulated machine with one CPU, whose
clock counts instructions (2 ns each). Such figures repeat within a few per cent, whatever the
machine below does, and they compare the <em>work</em> that each runtime does. They are not the times of
real hardware: there, what leaves a virtual CPU costs more than the instructions it takes, which is
why those exits are counted beside the times. Memory, and starts after caches were dropped, were
measured in the same machine with an ordinary clock.</p>
<p>Each figure is the median of its samples, with the least and the most of them below it where they
differ. gVisor runs without a network of its own (<code>--network=none</code>). <em>÷ runc</em> is
Husk's figure by runc's.</p>
";

/// The whole page.
pub(super) fn page(results: &Results) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Husk, measured</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <main>\n<h1>Husk, measured</h1>\n"
    );
    page += &verdict(results);
    page += METHOD;
    page += &targets(results);
    page += &ratios(results);
    page += &starts(&results.traces);
    page += "<h2>All figures</h2>\n";
    for section in Section::ALL {
        page += &table(results, section);
    }
    page += &failures(results);
    page += "</main>\n</body>\n</html>\n";
    page
}

fn judged(results: &Results) -> impl Iterator<Item = (&'static Measure, bool)> {
    measures::ALL
        .iter()
        .filter_map(|measure| Some((measure, results.is_met(measure)?)))
}

fn verdict(results: &Results) -> String {
    let all = judged(results).count();
    let met = judged(results).filter(|(_, is_met)| *is_met).count();
    format!("<p><strong>{met} of {all} targets are met.</strong></p>\n")
}

fn targets(results: &Results) -> String {
    let mut rows = String::new();
    for (measure, is_met) in judged(results) {
        let target = match measure.target {
            Target::OfRunc(ratio) => format!("{} {ratio} × runc", sign(measure)),
            _ => format!(
                "{} {} {}",
                sign(measure),
                results.limit(measure).map_or_else(none, short),
                measure.unit
            ),
        };
        let husk = results.median(measure.name, Subject::Husk);
        let ratio = husk.zip(results.median(measure.name, Subject::Runc));
        let _ = writeln!(
            rows,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{target}</td>{}</tr>",
            escaped(measure.title),
            husk.map_or_else(none, |husk| format!("{} {}", short(husk), measure.unit)),
            ratio.map_or_else(none, |(husk, runc)| format!("{:.2}", husk / runc)),
            met_cell(Some(is_met)),
        );
    }
    format!(
        "<h2>Targets</h2>\n<div class=\"wide\"><table>\n<tr><th scope=\"col\">measure</th>\
         <th scope=\"col\">Husk</th><th scope=\"col\">÷ runc</th><th scope=\"col\">target</th>\
         <th scope=\"col\">verdict</th></tr>\n{rows}</table></div>\n"
    )
}

fn ratios(results: &Results) -> String {
    let cost = |measure: &Measure, subject| {
        let runc = results.median(measure.name, Subject::Runc)?;
        let other = results.median(measure.name, subject)?;
        let ratio = match measure.better {
            Better::Less => other / runc,
            Better::More => runc / other,
        };
        (ratio.is_finite() && ratio > 0.0).then_some((subject, ratio))
    };
    let rows: Vec<_> = measures::ALL
        .iter()
        .filter(|measure| cost(measure, Subject::Husk).is_some())
        .map(|measure| Ratios {
            name: measure.name,
            costs: [Subject::Husk, Subject::Gvisor]
                .into_iter()
                .filter_map(|subject| cost(measure, subject))
                .collect(),
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<h2>Beside runc</h2>\n<p>What each thing costs, as a multiple of what it costs with runc: \
         left of the dashed line is better. <span class=\"key\">● Husk</span>, \
         <span class=\"key gvisor\">◆ gVisor</span>. Rates are turned round, so that more is \
         worse everywhere.</p>\n<div class=\"wide\">{}</div>\n",
        svg::ratios(&rows)
    )
}

fn starts(traces: &[Trace]) -> String {
    if traces.is_empty() {
        return String::new();
    }
    let end_s = traces
        .iter()
        .flat_map(|trace| trace.phases.last().map(|phase| phase.to_s))
        .fold(0.0, f64::max);
    let mut text =
        "<h2>Where a start's time goes</h2>\n<p>One warm <code>ctr run --rm … echo</code> \
        each, taken apart by a trace of the kernel and the shim's log.</p>\n"
            .to_owned();
    for trace in traces {
        let _ = write!(
            text,
            "<h3>{}</h3>\n<div class=\"wide\">{}</div>\n",
            trace.subject,
            svg::gantt(trace, end_s)
        );
        text += &exits(trace);
    }
    text
}

fn exits(trace: &Trace) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    for (reason, _) in trace.phases.iter().flat_map(|phase| &phase.exits) {
        if !reasons.contains(&reason.as_str()) {
            reasons.push(reason);
        }
    }
    if reasons.is_empty() {
        return String::new();
    }
    let count = |phase: &crate::record::Phase, wanted: &str| {
        phase
            .exits
            .iter()
            .find(|(reason, _)| reason == wanted)
            .map_or(0, |(_, count)| *count)
    };
    let mut head = String::new();
    for reason in &reasons {
        let _ = write!(head, "<th scope=\"col\">{}</th>", escaped(reason));
    }
    let mut rows = String::new();
    for phase in trace.phases.iter().filter(|phase| !phase.exits.is_empty()) {
        let _ = write!(rows, "<tr><td>{}</td>", escaped(&phase.name));
        let total: u64 = phase.exits.iter().map(|(_, count)| count).sum();
        let _ = write!(rows, "<td>{total}</td>");
        for reason in &reasons {
            let _ = write!(rows, "<td>{}</td>", count(phase, reason));
        }
        rows += "</tr>\n";
    }
    format!(
        "<div class=\"wide\"><table>\n<caption>Exits of the virtual CPU in each phase, by KVM's \
         reasons</caption>\n<tr><th scope=\"col\">phase</th><th scope=\"col\">all</th>{head}</tr>\n\
         {rows}</table></div>\n"
    )
}

fn table(results: &Results, section: Section) -> String {
    let mut rows = String::new();
    for measure in results.section(section) {
        let _ = write!(
            rows,
            "<tr><td>{}<small>{}</small></td><td>{}</td>",
            escaped(measure.title),
            measure.name,
            measure.unit
        );
        for subject in Subject::ALL {
            rows += &value_cell(results, measure, subject);
        }
        let ratio = results
            .median(measure.name, Subject::Husk)
            .zip(results.median(measure.name, Subject::Runc))
            .map_or_else(String::new, |(husk, runc)| format!("{:.2}", husk / runc));
        let limit = results.limit(measure).map_or_else(String::new, |limit| {
            format!("{} {}", sign(measure), short(limit))
        });
        let _ = writeln!(
            rows,
            "<td>{ratio}</td><td>{limit}</td>{}</tr>",
            met_cell(results.is_met(measure))
        );
    }
    if rows.is_empty() {
        return String::new();
    }
    let mut head = String::new();
    for subject in Subject::ALL {
        let _ = write!(head, "<th scope=\"col\">{subject}</th>");
    }
    format!(
        "<h3>{}</h3>\n<div class=\"wide\"><table>\n<tr><th scope=\"col\">measure</th>\
         <th scope=\"col\">unit</th>{head}<th scope=\"col\">÷ runc</th>\
         <th scope=\"col\">target</th><th scope=\"col\">verdict</th></tr>\n{rows}</table></div>\n",
        section.title()
    )
}

fn value_cell(results: &Results, measure: &Measure, subject: Subject) -> String {
    let Some(summary) = results.summary(measure.name, subject) else {
        return format!("<td>{}</td>", none());
    };
    let (least, most) = (short(summary.least), short(summary.most));
    let spread = if least == most {
        String::new()
    } else {
        format!("<small>{least} to {most}</small>")
    };
    format!(
        "<td title=\"{} samples\">{}{spread}</td>",
        summary.count,
        short(summary.median)
    )
}

fn failures(results: &Results) -> String {
    if results.failures.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for (measure, subject, why) in &results.failures {
        let _ = writeln!(
            rows,
            "<li>{} of {subject}: {}</li>",
            escaped(measure),
            escaped(why)
        );
    }
    format!("<h2>Not measured</h2>\n<ul>\n{rows}</ul>\n")
}

fn sign(measure: &Measure) -> &'static str {
    match measure.better {
        Better::Less => "≤",
        Better::More => "≥",
    }
}

fn met_cell(is_met: Option<bool>) -> &'static str {
    match is_met {
        Some(true) => "<td class=\"met\">met</td>",
        Some(false) => "<td class=\"missed\">missed</td>",
        None => "<td></td>",
    }
}

fn none() -> String {
    "–".to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::sample_results;
    use super::*;

    #[test]
    fn page_of_nothing_is_whole() {
        let page = page(&Results::default());
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
        assert!(page.contains("0 of 0 targets"));
    }

    #[test]
    fn reason_of_a_failure_cannot_break_the_page() {
        let results = Results {
            failures: vec![(
                "exec_true".to_owned(),
                Subject::Husk,
                "<script>1</script>".to_owned(),
            )],
            ..Results::default()
        };
        let page = page(&results);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert!(page.contains("class=\"missed\""));
    }

    #[test]
    fn page_needs_nothing_else() {
        let results = sample_results(&[
            ("start_total", Subject::Husk, 0.5),
            ("start_total", Subject::Runc, 0.75),
        ]);
        let page = page(&results);
        for reference in ["http:", "https:", "src=", "url(", "@import", "<link"] {
            assert!(!page.contains(reference), "{reference}");
        }
        assert!(page.contains("1 of 1 targets are met"));
    }
}
