//! What many samples of one thing come to.

/// The middle, and how far the samples lie apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    pub(crate) count: usize,
}

impl Summary {
    /// `None` without samples, and when one of them is not a finite number.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        if !samples.iter().all(|sample| sample.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = if sorted.len() % 2 == 1 {
            upper
        } else {
            f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, upper)
        };
        Some(Self {
            median,
            least: *sorted.first()?,
            most: *sorted.last()?,
            count: sorted.len(),
        })
    }
}

/// A number in few digits, as people compare numbers.
pub(crate) fn short(value: f64) -> String {
    let size = value.abs();
    if size >= 1000.0 {
        let whole = format!("{value:.0}");
        group_thousands(&whole)
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 || size == 0.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

fn group_thousands(digits: &str) -> String {
    let mut grouped = String::new();
    let count = digits.len();
    for (index, digit) in digits.chars().enumerate() {
        let left = count.saturating_sub(index);
        if index > 0 && left.is_multiple_of(3) && digit.is_ascii_digit() && grouped != "-" {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_and_what_is_no_number_have_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
        assert_eq!(Summary::of(&[1.0, f64::INFINITY]), None);
    }

    #[test]
    fn median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(Summary::of(&[3.0]).unwrap().median, 3.0);
        assert_eq!(Summary::of(&[9.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 9.0]).unwrap().median, 3.0);
    }

    #[test]
    fn spread_is_that_of_all_samples() {
        let summary = Summary::of(&[4.0, 1.0, 2.0]).unwrap();
        assert_eq!((summary.least, summary.most, summary.count), (1.0, 4.0, 3));
    }

    #[test]
    fn numbers_are_shortened_and_grouped() {
        let cases = [
            (0.0, "0.00"),
            (0.12345, "0.123"),
            (7.0, "7.00"),
            (24.61, "24.6"),
            (256.4, "256"),
            (1234.4, "1 234"),
            (-1_234_567.0, "-1 234 567"),
        ];
        for (value, expected) in cases {
            assert_eq!(short(value), expected);
        }
    }
}
