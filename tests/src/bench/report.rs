//! Figures with their limits, as a table and as JSON.

use serde::Serialize;

/// A measured value and what it is held to.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// The median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many runs were counted.
    pub runs: usize,
}

impl Figure {
    /// The figure of several runs; `None` without any.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, min, max, runs: values.len() })
    }

    /// The figure of one reading.
    pub fn once(value: f64) -> Self {
        Self { median: value, min: value, max: value, runs: 1 }
    }
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Of the figures: `ms`, `µs`, `MiB`, `MB/s`.
    pub unit: &'static str,
    /// Ours.
    pub vmshim: Figure,
    /// runc's, where it has one.
    pub runc: Option<Figure>,
    /// What `ratio`, or ours where there is no ratio, has to keep to.
    pub limit: Option<Limit>,
    /// Runs that hung and were repeated.
    pub hung: usize,
}

/// What a row is held to.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

impl Row {
    /// Ours over runc's.
    pub fn ratio(&self) -> Option<f64> {
        self.runc.as_ref().map(|runc| self.vmshim.median / runc.median)
    }

    /// Whether the limit is kept; `None` where there is none.
    pub fn met(&self) -> Option<bool> {
        let value = self.ratio().unwrap_or(self.vmshim.median);
        self.limit.map(|limit| match limit {
            Limit::AtMost(most) => value <= most,
            Limit::AtLeast(least) => value >= least,
        })
    }

    fn verdict(&self) -> String {
        let value = self.ratio().unwrap_or(self.vmshim.median);
        match (self.limit, self.met()) {
            (Some(Limit::AtMost(most)), Some(met)) => verdict(met, "<=", most, value - most),
            (Some(Limit::AtLeast(least)), Some(met)) => verdict(met, ">=", least, least - value),
            _ => String::new(),
        }
    }
}

fn verdict(met: bool, sign: &str, limit: f64, by: f64) -> String {
    if met { format!("{sign} {limit}: met") } else { format!("{sign} {limit}: missed by {by:.2}") }
}

/// All that was measured, and on what.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// `icount`, `test-host` or `hardware`.
    pub mode: String,
    /// The daemon's version.
    pub containerd: String,
    /// The host's kernel.
    pub host_kernel: String,
    /// The lines.
    pub rows: Vec<Row>,
}

impl Report {
    /// The table a person reads.
    pub fn table(&self) -> String {
        let mut text = format!(
            "mode {}, {}, host kernel {}; median (min..max) of n runs\n\n{:<46} {:>24} {:>24} {:>6}  {}\n",
            self.mode, self.containerd, self.host_kernel, "", "vmshim", "runc", "ratio", "limit"
        );
        for row in &self.rows {
            let name = format!("{} [{}]", row.name, row.unit);
            let ours = figure(&row.vmshim);
            let theirs = row.runc.as_ref().map(figure).unwrap_or_default();
            let ratio = row.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            let hung = if row.hung > 0 { format!("  ({} hung, repeated)", row.hung) } else { String::new() };
            text.push_str(&format!(
                "{name:<46} {ours:>24} {theirs:>24} {ratio:>6}  {}{hung}\n",
                row.verdict()
            ));
        }
        text
    }
}

fn figure(figure: &Figure) -> String {
    if figure.runs == 1 {
        return format!("{:.1}", figure.median);
    }
    format!("{:.1} ({:.1}..{:.1}) {}", figure.median, figure.min, figure.max, figure.runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(vmshim: f64, runc: Option<f64>, limit: Limit) -> Row {
        let runc = runc.map(Figure::once);
        Row { name: "x".into(), unit: "ms", vmshim: Figure::once(vmshim), runc, limit: Some(limit), hung: 0 }
    }

    #[test]
    fn median_of_even_and_odd_counts() {
        assert_eq!(Figure::of(vec![3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Figure::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert!(Figure::of(vec![]).is_none());
    }

    #[test]
    fn a_limit_holds_the_ratio_where_there_is_one() {
        assert_eq!(row(16.0, Some(10.0), Limit::AtMost(1.6)).met(), Some(true));
        assert_eq!(row(17.0, Some(10.0), Limit::AtMost(1.6)).met(), Some(false));
        assert_eq!(row(2.9, None, Limit::AtMost(3.0)).met(), Some(true));
        assert_eq!(row(4.0, Some(10.0), Limit::AtLeast(0.5)).met(), Some(false));
    }
}
