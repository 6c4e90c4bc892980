//! Plots, as SVG inside of the page: colours come from its style sheet, and each plot says in words
//! what it shows.

use std::fmt::Write;

use crate::record::{Subject, Trace};
use crate::statistics::short;

const WIDTH: f64 = 960.0;
const ROW: f64 = 24.0;

/// Where the bars begin: the names stand before.
const LEFT: f64 = 300.0;

/// What numbers after the bars need.
const RIGHT: f64 = 80.0;

const AXIS: f64 = 28.0;

/// Text as HTML and SVG take it.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The phases of one start below each other, on an axis from 0 to `end_s`.
pub(super) fn gantt(trace: &Trace, end_s: f64) -> String {
    let scale = if end_s > 0.0 {
        (WIDTH - LEFT - RIGHT) / end_s
    } else {
        0.0
    };
    let rows = count_to_f64(trace.phases.len());
    let bottom = rows * ROW;
    let mut body = axis(
        &ticks(end_s),
        bottom,
        |at_s| LEFT + at_s * scale,
        |at_s| format!("{} s", tidy(at_s)),
    );
    for (index, phase) in trace.phases.iter().enumerate() {
        let y = count_to_f64(index) * ROW;
        let x = LEFT + phase.from_s * scale;
        let width = ((phase.to_s - phase.from_s) * scale).max(1.0);
        let took_ms = (phase.to_s - phase.from_s) * 1e3;
        let _ = write!(
            body,
            "<text class=\"name\" x=\"{}\" y=\"{}\">{}</text>\
             <rect class=\"{}\" x=\"{x:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{took_ms:.0} ms</text>",
            LEFT - 10.0,
            y + 16.0,
            escaped(&phase.name),
            trace.subject.name(),
            y + 3.0,
            ROW - 6.0,
            x + width + 6.0,
            y + 16.0,
        );
    }
    let label = format!(
        "Phases of a start with {}: {}",
        trace.subject,
        trace
            .phases
            .iter()
            .map(|phase| format!("{} {:.0} ms", phase.name, (phase.to_s - phase.from_s) * 1e3))
            .collect::<Vec<_>>()
            .join("; ")
    );
    svg(&label, bottom + AXIS, &body)
}

/// One row of the plot of ratios.
pub(super) struct Ratios<'a> {
    pub(super) name: &'a str,
    /// What it costs as a multiple of what it costs with runc, by whom.
    pub(super) costs: Vec<(Subject, f64)>,
}

/// Costs as multiples of runc's, on a logarithmic axis.
pub(super) fn ratios(rows: &[Ratios<'_>]) -> String {
    let costs = rows
        .iter()
        .flat_map(|row| row.costs.iter().map(|(_, cost)| *cost));
    let (low, high) = costs.fold((0.5_f64, 2.0_f64), |(low, high), cost| {
        (low.min(cost), high.max(cost))
    });
    let (low, high) = (low.log2().floor(), high.log2().ceil());
    let scale = (WIDTH - LEFT - RIGHT) / (high - low);
    let place = |cost: f64| LEFT + (cost.log2() - low) * scale;
    let bottom = count_to_f64(rows.len()) * ROW;

    // Powers of two, not so many that their numbers touch.
    let step = ((high - low) / 10.0).ceil().max(1.0);
    let mut powers = Vec::new();
    let mut power = (low / step).ceil() * step;
    while power <= high {
        powers.push(power.exp2());
        power += step;
    }
    let mut body = axis(&powers, bottom, place, |cost| {
        if cost < 1.0 {
            format!("1/{}×", tidy(1.0 / cost))
        } else {
            format!("{}×", tidy(cost))
        }
    });
    let one = place(1.0);
    let _ = write!(
        body,
        "<line class=\"one\" x1=\"{one:.1}\" y1=\"0\" x2=\"{one:.1}\" y2=\"{bottom}\"/>"
    );
    for (index, row) in rows.iter().enumerate() {
        let y = count_to_f64(index) * ROW + ROW / 2.0;
        let _ = write!(
            body,
            "<text class=\"name\" x=\"{}\" y=\"{}\">{}</text>",
            LEFT - 10.0,
            y + 4.0,
            escaped(row.name)
        );
        for (subject, cost) in &row.costs {
            body += &marker(*subject, place(*cost), y, one);
            let _ = write!(
                body,
                "<title>{subject}: {} × runc</title></g>",
                short(*cost)
            );
        }
    }
    let said: Vec<_> = rows
        .iter()
        .map(|row| {
            let costs = row.costs.iter();
            let costs: Vec<_> = costs
                .map(|(who, cost)| format!("{who} {}", short(*cost)))
                .collect();
            format!("{}: {}", row.name, costs.join(", "))
        })
        .collect();
    let label = format!("Cost as a multiple of runc's. {}", said.join("; "));
    svg(&label, bottom + AXIS, &body)
}

/// An open group: Husk is a bar from 1 with a round end, others a diamond.
fn marker(subject: Subject, x: f64, y: f64, one: f64) -> String {
    let class = subject.name();
    if subject == Subject::Husk {
        let (from, width) = if x < one {
            (x, one - x)
        } else {
            (one, x - one)
        };
        format!(
            "<g class=\"{class}\"><rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
             height=\"8\"/><circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"6\"/>",
            y - 4.0
        )
    } else {
        format!(
            "<g class=\"{class}\"><path d=\"M{x:.1} {:.1}l6 6l-6 6l-6 -6z\"/>",
            y - 6.0
        )
    }
}

/// Vertical lines at `ticks`, with their names below.
fn axis(
    ticks: &[f64],
    bottom: f64,
    place: impl Fn(f64) -> f64,
    name: impl Fn(f64) -> String,
) -> String {
    let mut body = String::new();
    for tick in ticks {
        let x = place(*tick);
        let _ = write!(
            body,
            "<line class=\"tick\" x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
             <text class=\"scale\" x=\"{x:.1}\" y=\"{}\">{}</text>",
            bottom + 18.0,
            name(*tick)
        );
    }
    body
}

/// Round numbers from 0 to `end`, some five to ten of them.
fn ticks(end: f64) -> Vec<f64> {
    if !end.is_finite() || end <= 0.0 {
        return vec![0.0];
    }
    let power = 10_f64.powf((end / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| end / step <= 8.0)
        .unwrap_or(end);
    let mut ticks = Vec::new();
    let mut at = 0.0;
    while at <= end {
        ticks.push(at);
        at += step;
    }
    ticks
}

/// A number that is round already.
fn tidy(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn svg(label: &str, height: f64, body: &str) -> String {
    let label = escaped(label);
    format!(
        "<svg role=\"img\" aria-label=\"{label}\" viewBox=\"0 0 {WIDTH} {height}\">{body}</svg>\n"
    )
}

#[expect(clippy::cast_precision_loss, reason = "rows of a plot are few")]
fn count_to_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Phase;

    #[test]
    fn names_cannot_break_the_page() {
        assert_eq!(escaped("<a b=\"c\">&"), "&lt;a b=&quot;c&quot;&gt;&amp;");
    }

    #[test]
    fn plots_of_nothing_have_no_numbers_that_are_none() {
        let trace = Trace {
            subject: Subject::Husk,
            phases: Vec::new(),
        };
        for plot in [gantt(&trace, 0.0), ratios(&[])] {
            assert!(!plot.contains("NaN") && !plot.contains("inf"), "{plot}");
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(
            ticks(0.8),
            [
                0.0,
                0.1,
                0.2,
                0.30000000000000004,
                0.4,
                0.5,
                0.6,
                0.7,
                0.7999999999999999
            ]
        );
        assert_eq!(ticks(8.0).len(), 9);
        assert_eq!(ticks(f64::NAN), [0.0]);
    }

    #[test]
    fn every_phase_has_a_bar_and_its_name() {
        let phase = Phase {
            name: "boot & run".to_owned(),
            from_s: 0.1,
            to_s: 0.35,
            exits: Vec::new(),
        };
        let trace = Trace {
            subject: Subject::Husk,
            phases: vec![phase],
        };
        let plot = gantt(&trace, 1.0);
        assert!(
            plot.contains("boot &amp; run</text>") && plot.contains(">250 ms<"),
            "{plot}"
        );
    }
}
