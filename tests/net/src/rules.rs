//! Which packets pass, and how late. A pure function of the rules, the two addresses and a seeded generator (`NT-3`).

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

/// A bad network, the same on every link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// How late packets are, on the average.
    pub delay: Duration,
    /// They are up to this much earlier or later, each by itself, so they overtake each other.
    pub jitter: Duration,
    /// Of a thousand packets, so many are lost.
    pub lost_per_mille: u16,
}

/// `SplitMix64`, whose whole state is its seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What is cut, and the weather.
#[derive(Debug)]
pub(crate) struct Rules {
    cut: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    isolated: BTreeSet<Ipv4Addr>,
    weather: Option<Weather>,
    random: Random,
}

impl Rules {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { cut: BTreeSet::new(), isolated: BTreeSet::new(), weather: None, random: Random::new(seed) }
    }

    pub(crate) fn cut(&mut self, from: Ipv4Addr, to: Ipv4Addr) {
        self.cut.insert((from, to));
    }

    pub(crate) fn isolate(&mut self, host: Ipv4Addr) {
        self.isolated.insert(host);
    }

    pub(crate) const fn set_weather(&mut self, weather: Option<Weather>) {
        self.weather = weather;
    }

    pub(crate) fn heal(&mut self) {
        self.cut.clear();
        self.isolated.clear();
        self.weather = None;
    }

    /// Whether nothing passes from one host to the other.
    pub(crate) fn is_cut(&self, from: Ipv4Addr, to: Ipv4Addr) -> bool {
        [from, to].iter().any(|host| self.isolated.contains(host)) || self.cut.contains(&(from, to))
    }

    /// How late a packet is; nothing when it is lost.
    pub(crate) fn delay(&mut self, from: Ipv4Addr, to: Ipv4Addr) -> Option<Duration> {
        if self.is_cut(from, to) {
            return None;
        }
        let Some(Weather { delay, jitter, lost_per_mille }) = self.weather else { return Some(Duration::ZERO) };
        if self.random.below(1000) < u64::from(lost_per_mille) {
            return None;
        }
        let width = u64::try_from(jitter.as_micros()).unwrap_or(u64::MAX / 4) * 2;
        let late = Duration::from_micros(self.random.below(width + 1));
        Some((delay + late).saturating_sub(jitter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: [Ipv4Addr; 3] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)];

    /// The first numbers of seed 1234567, as Vigna's `splitmix64.c` gives them.
    #[test]
    fn nt_3_the_generator_is_splitmix64() {
        let mut random = Random::new(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next(), random.next(), random.next()], expected);
    }

    #[test]
    fn cuts_have_a_direction_and_isolation_has_none() {
        let [a, b, c] = HOSTS;
        let mut rules = Rules::new(1);
        rules.cut(a, b);
        rules.isolate(c);
        let passes = |rules: &mut Rules, from, to| rules.delay(from, to) == Some(Duration::ZERO);
        assert!(!passes(&mut rules, a, b) && passes(&mut rules, b, a));
        assert!(!passes(&mut rules, a, c) && !passes(&mut rules, c, a));
        rules.heal();
        assert!(passes(&mut rules, a, b) && passes(&mut rules, a, c) && passes(&mut rules, c, a));
    }

    /// NT-3, and that losses and delays are what was asked for: of 10,000 packets 5 % within four standard deviations (22 each).
    #[test]
    fn nt_3_weather_follows_from_the_seed() {
        let [a, b, _] = HOSTS;
        let weather =
            Weather { delay: Duration::from_millis(150), jitter: Duration::from_millis(100), lost_per_mille: 50 };
        let packets = |seed| {
            let mut rules = Rules::new(seed);
            rules.set_weather(Some(weather));
            (0..10_000).map(|_| rules.delay(a, b)).collect::<Vec<_>>()
        };
        let first = packets(7);
        assert!(first == packets(7) && first != packets(8));
        let lost = first.iter().filter(|delay| delay.is_none()).count();
        assert!((412..588).contains(&lost), "{lost}");
        let delays: Vec<Duration> = first.into_iter().flatten().collect();
        assert!(delays.iter().all(|delay| (50..=250).contains(&delay.as_millis())));
        let mean = delays.iter().sum::<Duration>() / u32::try_from(delays.len()).expect("few");
        assert!((147..153).contains(&mean.as_millis()), "{mean:?}");
    }
}
