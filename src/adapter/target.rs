//! Which modules an adapter is on, with rank, alpha and scale of each: PEFT's rule.

use std::collections::BTreeSet;

use regex::Regex;

use super::merge::{Matrix, Orientation};
use super::{AdapterConfig, AdapterError, TargetModules};
use crate::model::{Alias, Architecture, Role, Skeleton, SkeletonTensor};

/// A linear layer of the base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    /// Its name: the weight's without `.weight`.
    pub module: String,
    /// The number of outputs.
    pub out_features: u64,
    /// The number of inputs.
    pub in_features: u64,
    /// Whether it is the output head, which `all-linear` leaves out.
    pub head: bool,
    /// Whether its weight is another's, the embedding's. No adapter goes there: merged, it would change the embedding too.
    pub tied: bool,
    /// How its weight is stored.
    pub orientation: Orientation,
}

/// A module with an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The module's name.
    pub module: String,
    /// The number of outputs.
    pub out_features: u64,
    /// The number of inputs.
    pub in_features: u64,
    /// How the base weight is stored.
    pub orientation: Orientation,
    /// Rank.
    pub r: u64,
    /// Alpha.
    pub alpha: f64,
    /// What the product B·A is multiplied with.
    pub scale: f64,
}

impl Target {
    /// The sizes of the base's weight.
    #[must_use]
    pub const fn matrix(&self) -> Matrix {
        let Self { out_features, in_features, orientation, .. } = *self;
        Matrix { out_features, in_features, orientation }
    }
}

/// alpha / r, or alpha / sqrt(r) for rsLoRA.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a rank is at most MAX_RANK")]
pub fn scale(r: u64, alpha: f64, use_rslora: bool) -> f64 {
    let r = r as f64;
    alpha / if use_rslora { r.sqrt() } else { r }
}

/// The linear layers of a model, in its order, tied ones last.
#[must_use]
pub fn linears(skeleton: &Skeleton) -> Vec<LinearModule> {
    let linear = |tensor: &SkeletonTensor| {
        let head = match tensor.role {
            Role::Linear => false,
            Role::Head => true,
            _ => return None,
        };
        let module = tensor.fqn.as_str().strip_suffix(".weight")?;
        let &[rows, columns] = tensor.shape.0.as_slice() else { return None };
        // GPT-2's linear layers are `Conv1D`, but for its head.
        let (orientation, out_features, in_features) = match skeleton.architecture {
            Architecture::Gpt2 if !head => (Orientation::InOut, columns, rows),
            _ => (Orientation::OutIn, rows, columns),
        };
        Some(LinearModule { module: module.to_owned(), out_features, in_features, head, tied: false, orientation })
    };
    let tied = |alias: &Alias| {
        let tensor = skeleton.tensors.iter().find(|tensor| tensor.fqn == alias.target)?;
        let head = SkeletonTensor { fqn: alias.alias.clone(), role: Role::Head, ..tensor.clone() };
        Some(LinearModule { tied: true, ..linear(&head)? })
    };
    skeleton.tensors.iter().filter_map(linear).chain(skeleton.aliases.iter().filter_map(tied)).collect()
}

impl AdapterConfig {
    /// The modules that the adapter is on, in the order of `linears`.
    ///
    /// # Errors
    /// [`AdapterError::NoMatch`] when there is none, [`AdapterError::Pattern`], [`AdapterError::Unsupported`] when a tied
    /// output head is among them.
    pub fn targets(&self, linears: &[LinearModule]) -> Result<Vec<Target>, AdapterError> {
        let wanted = Matcher::new("target_modules", &self.target_modules)?;
        let excluded =
            self.exclude_modules.as_ref().map(|modules| Matcher::new("exclude_modules", modules)).transpose()?;
        let layers = Layers::new(self)?;
        let ranks = Patterns::new("rank_pattern", &self.rank_pattern)?;
        let alphas = Patterns::new("alpha_pattern", &self.alpha_pattern)?;
        let mut targets = Vec::new();
        for linear in linears {
            let name = linear.module.as_str();
            let excluded = excluded.as_ref().is_some_and(|excluded| excluded.matches(linear) != Match::No);
            let matched = match wanted.matches(linear) {
                Match::No => false,
                // PEFT looks at layers only where the end of a name matched.
                Match::Suffix => layers.contain(name),
                Match::Whole => true,
            };
            if excluded || !matched {
                continue;
            }
            if linear.tied {
                let reason = "its weight is the embedding's (tied), which an adapter would change too";
                return Err(AdapterError::Unsupported {
                    field: "target_modules".to_owned(),
                    found: name.to_owned(),
                    reason,
                });
            }
            let r = ranks.get(name).unwrap_or(self.r);
            let alpha = alphas.get(name).unwrap_or(self.lora_alpha);
            targets.push(Target {
                module: linear.module.clone(),
                out_features: linear.out_features,
                in_features: linear.in_features,
                orientation: linear.orientation,
                r,
                alpha,
                scale: scale(r, alpha, self.use_rslora),
            });
        }
        if targets.is_empty() { Err(self.no_match(linears)) } else { Ok(targets) }
    }

    fn no_match(&self, linears: &[LinearModule]) -> AdapterError {
        let targets = match &self.target_modules {
            TargetModules::AllLinear => "all-linear".to_owned(),
            TargetModules::Pattern(pattern) => format!("{pattern:?}"),
            TargetModules::Names(names) => names.join(", "),
        };
        // A model has few kinds of linear layers and many layers.
        let ends: BTreeSet<&str> =
            linears.iter().map(|linear| linear.module.rsplit('.').next().unwrap_or_default()).collect();
        let modules = if ends.is_empty() { "none".to_owned() } else { Vec::from_iter(ends).join(", ") };
        AdapterError::NoMatch { targets, modules }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    No,
    Suffix,
    Whole,
}

enum Matcher<'a> {
    AllLinear,
    Pattern(Regex),
    Names(&'a [String]),
}

impl<'a> Matcher<'a> {
    fn new(field: &'static str, modules: &'a TargetModules) -> Result<Self, AdapterError> {
        Ok(match modules {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::Pattern(pattern) => Self::Pattern(regex(field, pattern, &format!("^(?:{pattern})$"))?),
            TargetModules::Names(names) => Self::Names(names),
        })
    }

    fn matches(&self, linear: &LinearModule) -> Match {
        let name = linear.module.as_str();
        let ends_with = |end: &String| name.strip_suffix(end.as_str()).is_some_and(|stem| stem.ends_with('.'));
        match self {
            Self::AllLinear if !linear.head => Match::Whole,
            Self::Pattern(pattern) if pattern.is_match(name) => Match::Whole,
            Self::Names(names) if names.iter().any(|wanted| wanted == name) => Match::Whole,
            Self::Names(names) if names.iter().any(ends_with) => Match::Suffix,
            _ => Match::No,
        }
    }
}

/// `layers_to_transform` with `layers_pattern`.
struct Layers<'a> {
    layers: Option<&'a [u64]>,
    patterns: Vec<Regex>,
}

impl<'a> Layers<'a> {
    fn new(config: &'a AdapterConfig) -> Result<Self, AdapterError> {
        let field = "layers_pattern";
        let mut patterns = Vec::new();
        for pattern in &config.layers_pattern {
            patterns.push(regex(field, pattern, &format!(r"^(?:|.*?\.){pattern}\.(?P<layer>\d+)\."))?);
        }
        if patterns.is_empty() {
            patterns.push(regex(field, "", r"^.*?\.[^.]*\.(?P<layer>\d+)\.")?);
        }
        Ok(Self { layers: config.layers_to_transform.as_deref(), patterns })
    }

    fn contain(&self, module: &str) -> bool {
        let Some(layers) = self.layers else { return true };
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(module));
        let layer = found.and_then(|found| found.name("layer")?.as_str().parse::<u64>().ok());
        layer.is_some_and(|layer| layers.contains(&layer))
    }
}

/// `rank_pattern` or `alpha_pattern`: the first key that matches the whole name or its end after a dot.
struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    fn new(field: &'static str, patterns: &[(String, T)]) -> Result<Self, AdapterError> {
        let compile = |(pattern, value): &(String, T)| {
            Ok((regex(field, pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, *value))
        };
        patterns.iter().map(compile).collect::<Result<_, _>>().map(Self)
    }

    fn get(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
    }
}

fn regex(field: &'static str, pattern: &str, whole: &str) -> Result<Regex, AdapterError> {
    Regex::new(whole).map_err(|source| AdapterError::Pattern { field, pattern: pattern.to_owned(), source })
}
