//! Pictures of an estimate: the memory of each rank as stacked bars, and which layers lie where; on a terminal and as SVG.
//!
//! Owns: lengths, colours and words. Refuses to know: where pictures go.

use std::fmt::Write as _;

use super::{DeviceMap, Estimate, RankEstimate};
use crate::types::{as_f64, as_u64};

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// The model's name.
    pub title: &'a str,
    /// The memory of the ranks.
    pub estimate: &'a Estimate,
    /// What each rank may use, in bytes; `u64::MAX` where nothing is said.
    pub budget_bytes: &'a [u64],
    /// Which unit (embedding, layers, norm, head) lies on which device, where whole layers do.
    pub map: Option<&'a DeviceMap>,
}

/// A letter and a colour for each term of [`RankEstimate::terms`], in its order.
const STYLES: [(char, &str); 16] = [
    ('w', "#4269d0"),
    ('s', "#9498a0"),
    ('.', "#d9d9d9"),
    ('p', "#3ca951"),
    ('g', "#ff725c"),
    ('o', "#efb118"),
    ('c', "#9c6b4e"),
    ('i', "#6cc5b0"),
    ('b', "#a463f2"),
    ('l', "#ff8ab7"),
    ('k', "#97bbf5"),
    ('G', "#2f6f8f"),
    ('r', "#bfa46f"),
    ('a', "#c7c0d6"),
    ('d', "#5b5b5b"),
    ('n', "#8a8a8a"),
];

/// Cells of a text bar.
const CELLS: u64 = 60;
/// Pixels of an SVG bar.
const PIXELS: u64 = 640;
const ROW_PIXELS: u64 = 34;
/// What a bar stands beside, in pixels.
const LEFT_PIXELS: u64 = 70;

impl Picture<'_> {
    /// The largest figure of all ranks, which a full bar stands for.
    fn scale_bytes(&self) -> u64 {
        let budgets = self.budget_bytes.iter().copied().filter(|budget| *budget < u64::MAX);
        self.estimate.ranks.iter().map(|rank| rank.peak_bytes).chain(budgets).max().unwrap_or(1).max(1)
    }

    fn budget(&self, rank: &RankEstimate) -> Option<u64> {
        self.budget_bytes.get(rank.rank.index()).copied().filter(|budget| *budget < u64::MAX)
    }

    /// Lines of text: a bar for each rank, a letter for each part of it, the end of what it may use as `|`, and what the letters
    /// mean.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let scale = self.scale_bytes();
        let mut lines = Vec::new();
        for rank in &self.estimate.ranks {
            let mut bar = String::new();
            for (letter, end) in ends(rank, scale, CELLS) {
                let drawn = as_u64(bar.chars().count());
                bar.extend((drawn..end).map(|_| letter));
            }
            let mut cells: Vec<char> = bar.chars().collect();
            cells.resize(crate::types::as_usize(CELLS) + 1, ' ');
            let budget = self.budget(rank);
            if let Some(cell) =
                budget.and_then(|budget| cells.get_mut(crate::types::as_usize(part(budget, scale, CELLS))))
            {
                *cell = '|';
            }
            let of = budget.map_or_else(String::new, |budget| format!(" of {}", gibibytes(budget)));
            let bar: String = cells.into_iter().collect();
            lines.push(format!("rank {:<3} {bar} {}{of} GiB", rank.rank, gibibytes(rank.peak_bytes)));
        }
        let used = |term: usize| self.estimate.ranks.iter().any(|rank| rank.terms()[term].1 > 0);
        let names = self.estimate.ranks.first().map(RankEstimate::terms).into_iter().flatten().enumerate();
        let legend: Vec<String> = names
            .zip(STYLES)
            .filter(|((term, _), _)| used(*term))
            .map(|((_, (name, _)), (letter, _))| format!("{letter} {name}"))
            .collect();
        lines.push(format!("         {}", legend.join(", ")));
        if let Some(map) = self.map {
            let device = |owner: &Option<usize>| owner.map_or('h', digit);
            let units: String = map.owners.iter().map(device).collect();
            lines.push(format!("units    {units} (embedding, layers, norm, head by device; h: host)"));
        }
        lines
    }

    /// An SVG document.
    #[must_use]
    pub fn svg(&self) -> String {
        let ranks = as_u64(self.estimate.ranks.len());
        let scale = self.scale_bytes();
        let map_row = if self.map.is_some() { 2 * ROW_PIXELS } else { 0 };
        let legend_rows = as_u64(STYLES.len()).div_ceil(4);
        let height = ROW_PIXELS * (ranks + 1) + map_row + 20 * legend_rows + 20;
        let width = LEFT_PIXELS + PIXELS + 170;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        );
        text(&mut svg, (8, 22), &format!("{}: memory of each rank", self.title));
        let mut top = ROW_PIXELS;
        for rank in &self.estimate.ranks {
            self.svg_bar(&mut svg, rank, top, scale);
            top += ROW_PIXELS;
        }
        if let Some(map) = self.map {
            svg_map(&mut svg, map, top);
            top += map_row;
        }
        let names = self.estimate.ranks.first().map(RankEstimate::terms).into_iter().flatten();
        for (number, ((name, _), (_, colour))) in (0..).zip(names.zip(STYLES)) {
            let (x, y) = (8 + number % 4 * 210, top + 14 + number / 4 * 20);
            rectangle(&mut svg, (x, y - 10), (12, 12), colour, name);
            text(&mut svg, (x + 18, y), name);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn svg_bar(&self, svg: &mut String, rank: &RankEstimate, top: u64, scale: u64) {
        text(svg, (8, top + 17), &format!("rank {}", rank.rank));
        let mut start = 0;
        let parts = rank.terms().into_iter().zip(ends(rank, scale, PIXELS)).zip(STYLES);
        for (((name, count), (_, end)), (_, colour)) in parts.filter(|(((_, count), _), _)| *count > 0) {
            let words = format!("{name}: {} GiB", gibibytes(count));
            rectangle(svg, (LEFT_PIXELS + start, top), (end.saturating_sub(start), 24), colour, &words);
            start = end;
        }
        let mut words = format!("{} GiB", gibibytes(rank.peak_bytes));
        if let Some(budget) = self.budget(rank) {
            let x = LEFT_PIXELS + part(budget, scale, PIXELS);
            rectangle(svg, (x.saturating_sub(1), top - 3), (2, 30), "#000000", "what it may use");
            let _ = write!(words, " of {}", gibibytes(budget));
        }
        text(svg, (LEFT_PIXELS + PIXELS + 10, top + 17), &words);
    }
}

/// One box for each unit, in the colour of its device.
fn svg_map(svg: &mut String, map: &DeviceMap, top: u64) {
    text(svg, (8, top + 17), "layers");
    let count = as_u64(map.owners.len()).max(1);
    for (number, owner) in (0..).zip(&map.owners) {
        let (start, end) = (number * PIXELS / count, (number + 1) * PIXELS / count);
        let colour = owner.map_or("#000000", |device| STYLES[device * 4 % STYLES.len()].1);
        let words = owner.map_or_else(|| "host".to_owned(), |device| format!("unit {number} on device {device}"));
        let width = (end - start).saturating_sub(1).max(1);
        rectangle(svg, (LEFT_PIXELS + start, top), (width, 24), colour, &words);
    }
    let devices: Vec<String> = (0..map.used_bytes.len())
        .map(|device| {
            let units = map.owners.iter().filter(|owner| **owner == Some(device)).count();
            format!("device {device}: {units} units")
        })
        .collect();
    text(svg, (LEFT_PIXELS, top + 42), &devices.join(", "));
}

/// Where each term's part of a bar of `length` ends.
fn ends(rank: &RankEstimate, scale: u64, length: u64) -> impl Iterator<Item = (char, u64)> {
    let sums = rank.terms().into_iter().scan(0_u64, |sum, (_, count)| {
        *sum = sum.saturating_add(count);
        Some(*sum)
    });
    sums.zip(STYLES).map(move |(sum, (letter, _))| (letter, part(sum, scale, length)))
}

/// `bytes` of `scale` in a bar of `length`.
fn part(bytes: u64, scale: u64, length: u64) -> u64 {
    let wide = u128::from(bytes) * u128::from(length) / u128::from(scale.max(1));
    u64::try_from(wide).unwrap_or(length).min(length)
}

fn digit(device: usize) -> char {
    u32::try_from(device).ok().and_then(|device| char::from_digit(device % 36, 36)).unwrap_or('?')
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.2}", as_f64(bytes) / as_f64(1 << 30))
}

fn rectangle(svg: &mut String, (x, y): (u64, u64), (width, height): (u64, u64), colour: &str, words: &str) {
    let words = escaped(words);
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"><title>{words}</title></rect>"
    );
}

fn text(svg: &mut String, (x, y): (u64, u64), words: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\">{}</text>", escaped(words));
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Rank;

    fn estimate() -> Estimate {
        let rank = |rank, weights_bytes, optimizer_bytes| {
            RankEstimate { weights_bytes, optimizer_bytes, ..RankEstimate::empty(Rank(rank)) }.summed()
        };
        Estimate {
            parameters: 1,
            trained_parameters: 0,
            ranks: vec![rank(0, 30 << 30, 15 << 30), rank(1, 15 << 30, 0)],
        }
    }

    /// By hand: 60 cells stand for 60 GiB, so 30 GiB of weights are 30 cells and 15 of moments 15; 48 GiB end at cell 48.
    #[test]
    fn bars_are_as_long_as_the_memory() {
        let estimate = estimate();
        let picture = Picture { title: "m", estimate: &estimate, budget_bytes: &[48 << 30, 60 << 30], map: None };
        let lines = picture.lines();
        let bar = |line: &str| line.chars().skip(9).take(61).collect::<String>();
        assert_eq!(bar(&lines[0]), format!("{}{}   |{}", "w".repeat(30), "o".repeat(15), " ".repeat(12)));
        assert_eq!(bar(&lines[1]), format!("{}{}|", "w".repeat(15), " ".repeat(45)));
        assert!(lines[0].ends_with("45.00 of 48.00 GiB"), "{}", lines[0]);
        assert_eq!(lines[2].trim(), "w weights, o optimizer");
    }

    /// 640 pixels stand for 60 GiB: 320 are 30 GiB. Names cannot break out of the document.
    #[test]
    fn a_picture_has_a_box_for_each_term() {
        let estimate = estimate();
        let map = DeviceMap { owners: vec![Some(0), Some(1), None], used_bytes: vec![1, 1], host_bytes: 1 };
        let picture =
            Picture { title: "<a&b>", estimate: &estimate, budget_bytes: &[60 << 30, u64::MAX], map: Some(&map) };
        let svg = picture.svg();
        assert!(svg.contains("<rect x=\"70\" y=\"34\" width=\"320\" height=\"24\" fill=\"#4269d0\">"), "{svg}");
        assert!(svg.contains("<rect x=\"390\" y=\"34\" width=\"160\" height=\"24\" fill=\"#efb118\">"), "{svg}");
        assert!(svg.contains("&lt;a&amp;b&gt;: memory of each rank") && svg.contains("<title>host</title>"), "{svg}");
        assert_eq!(svg.matches("<svg").count() + svg.matches("</svg>").count(), 2);
    }
}
