//! The models of a worker, and which of them a job is for.
//!
//! A job that names none goes by the weights, and by its id alone: every attempt, at every worker that has the same
//! models, comes to the same one. Nothing is counted or remembered.

use std::{convert::Infallible, path::PathBuf, str::FromStr, sync::Arc};

use async_nats::Client;
use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use dermflow_schemas::{
    id::JobId,
    limits::{MAX_MODEL_WEIGHT, MAX_MODELS},
    model::ModelRef,
    queue,
};
use futures_util::{StreamExt, stream::select_all};

use crate::model::Model;

/// `FOLDER` or `FOLDER=WEIGHT`: a model, and its part of the jobs that name none. A weight of 0 is for those that name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The model's folder.
    pub folder: PathBuf,
    /// 1 when none is given.
    pub weight: u32,
}

impl FromStr for Offer {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let weighted =
            text.rsplit_once('=').and_then(|(folder, weight)| Some((folder, weight.parse().ok()?)));
        let (folder, weight) = weighted.unwrap_or((text, 1));
        Ok(Self { folder: folder.into(), weight })
    }
}

/// Why models cannot be served together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OfferError {
    /// Two of them have one name and one version.
    #[error("the model {0} is given twice")]
    Twice(ModelRef),
    /// There are too many.
    #[error("at most {MAX_MODELS} models, not {0}")]
    TooMany(usize),
    /// No job would get a model unless it names one.
    #[error("no model has a weight above 0")]
    NoWeight,
    /// A weight is too large.
    #[error("a weight is at most {MAX_MODEL_WEIGHT}, not {0}")]
    Weight(u32),
}

/// The models of a worker.
pub struct Models(Vec<(Arc<Model>, u32)>);

impl Models {
    /// Each with its weight.
    ///
    /// # Errors
    /// See [`OfferError`].
    pub fn new(models: Vec<(Arc<Model>, u32)>) -> Result<Self, OfferError> {
        if models.len() > MAX_MODELS {
            return Err(OfferError::TooMany(models.len()));
        }
        if let Some((_, weight)) = models.iter().find(|(_, weight)| *weight > MAX_MODEL_WEIGHT) {
            return Err(OfferError::Weight(*weight));
        }
        if models.iter().all(|(_, weight)| *weight == 0) {
            return Err(OfferError::NoWeight);
        }
        let twice = |n: usize| models[..n].iter().any(|(model, _)| model.id == models[n].0.id);
        match (0..models.len()).find(|n| twice(*n)) {
            Some(n) => Err(OfferError::Twice(models[n].0.id.clone())),
            None => Ok(Self(models)),
        }
    }

    /// Which model `job` is for, with its number: of those that are `wanted`, or of all, each in proportion to its
    /// weight. `None` when the one that is wanted is not here.
    pub fn choose(&self, job: JobId, wanted: Option<&ModelRef>) -> Option<(usize, &Arc<Model>)> {
        let candidates = self.0.iter().enumerate();
        let candidates =
            candidates.filter(|(_, (model, _))| wanted.is_none_or(|wanted| wanted.means(&model.id)));
        let scored = candidates.map(|(n, (model, weight))| (score(job, &model.id, *weight), n, model));
        scored.min_by(|(a, ..), (b, ..)| a.total_cmp(b)).map(|(_, n, model)| (n, model))
    }

    /// Says so to whoever asks for one of these models, or for any, until the connection is closed.
    ///
    /// # Errors
    /// When it is closed already.
    pub async fn answer(&self, client: &Client) -> Result<(), async_nats::Error> {
        let ids = self.0.iter().map(|(model, _)| &model.id);
        let mut subjects: Vec<String> =
            ids.flat_map(|id| [id.clone(), id.any_version()]).map(|id| queue::model_subject(&id)).collect();
        subjects.push(queue::ANY_MODEL.to_owned());
        subjects.sort_unstable();
        subjects.dedup();
        let mut questions = Vec::new();
        for subject in subjects {
            questions.push(client.subscribe(subject).await?);
        }
        let (client, mut questions) = (client.clone(), select_all(questions));
        tokio::spawn(async move {
            while let Some(question) = questions.next().await {
                if let Some(inbox) = question.reply {
                    // Who gets no answer does without.
                    let _ = client.publish(inbox, Bytes::new()).await;
                }
            }
        });
        Ok(())
    }
}

/// Weighted rendezvous hashing: of several models the one with the least score has a job, each in proportion to its weight,
/// and when a weight changes or a model comes or goes, only jobs from or to that model go elsewhere.
fn score(job: JobId, model: &ModelRef, weight: u32) -> f64 {
    let hash = digest(&SHA256, format!("{job}:{model}").as_bytes());
    let bits = hash.as_ref().iter().take(8).fold(0_u64, |bits, byte| (bits << 8) | u64::from(*byte));
    // Above 0 and below 1, in steps that a double can hold.
    let uniform = ((bits >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
    -uniform.ln() / f64::from(weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::simulated;

    fn models(weights: &[(&str, u32)]) -> Models {
        let model =
            |version: &str| Arc::new(simulated(&[("version = \"1\"", &format!("version = \"{version}\""))]));
        Models::new(weights.iter().map(|(version, weight)| (model(version), *weight)).collect()).unwrap()
    }

    fn job(n: u32) -> JobId {
        format!("0198f3a2-9c1e-7c55-8f0e-{n:012x}").parse().unwrap()
    }

    fn chosen(models: &Models, n: u32, wanted: Option<&str>) -> Option<usize> {
        let wanted = wanted.map(|wanted| wanted.parse().unwrap());
        models.choose(job(n), wanted.as_ref()).map(|(number, _)| number)
    }

    #[test]
    fn an_offer_may_have_a_weight() {
        let offer = |text: &str| text.parse::<Offer>().map(|offer| (offer.folder, offer.weight)).unwrap();
        assert_eq!(offer("a/b"), ("a/b".into(), 1));
        assert_eq!(offer("a/b=5"), ("a/b".into(), 5));
        assert_eq!(offer("a=b/c"), ("a=b/c".into(), 1));
        assert_eq!(offer("a=b=0"), ("a=b".into(), 0));
    }

    #[test]
    fn shares_are_those_of_the_weights() {
        const JOBS: u32 = 100_000;
        let models = models(&[("1", 90), ("2", 8), ("3", 2), ("4", 0)]);
        let mut counts = [0_u32; 4];
        for n in 0..JOBS {
            counts[chosen(&models, n, None).unwrap()] += 1;
        }
        for (count, share) in counts.into_iter().zip([0.9, 0.08, 0.02, 0.0]) {
            let expected = f64::from(JOBS) * share;
            let bound = 5.0 * (expected * (1.0 - share)).sqrt();
            assert!((f64::from(count) - expected).abs() <= bound, "{counts:?}");
        }
    }

    /// What a canary gets more of comes from the others, and nothing else moves.
    #[test]
    fn a_heavier_canary_keeps_the_jobs_that_it_had() {
        let (light, heavy) = (models(&[("1", 95), ("2", 5)]), models(&[("2", 20), ("1", 80)]));
        let mut had = 0;
        for n in 0..10_000 {
            if chosen(&light, n, None) == Some(1) {
                had += 1;
                assert_eq!(chosen(&heavy, n, None), Some(0));
            }
        }
        assert!((400..600).contains(&had), "{had}");
    }

    #[test]
    fn who_names_a_model_gets_it_or_none() {
        let models = models(&[("1", 1), ("2", 0)]);
        for n in 0..100 {
            assert_eq!(chosen(&models, n, None), Some(0));
            assert_eq!(chosen(&models, n, Some("pretend")), Some(0));
            assert_eq!(chosen(&models, n, Some("pretend@2")), Some(1));
            assert_eq!(chosen(&models, n, Some("pretend@3")), None);
            assert_eq!(chosen(&models, n, Some("other")), None);
        }
    }

    #[test]
    fn what_cannot_be_served_together_is_refused() {
        let model = || Arc::new(simulated(&[]));
        let refused = |models: Vec<_>| Models::new(models).err();
        assert_eq!(refused(vec![(model(), 1), (model(), 1)]), Some(OfferError::Twice(model().id.clone())));
        assert_eq!(refused(vec![(model(), 0)]), Some(OfferError::NoWeight));
        assert_eq!(refused(Vec::new()), Some(OfferError::NoWeight));
        assert_eq!(
            refused(vec![(model(), MAX_MODEL_WEIGHT + 1)]),
            Some(OfferError::Weight(MAX_MODEL_WEIGHT + 1))
        );
        let many = vec![(model(), 1); MAX_MODELS + 1];
        assert_eq!(refused(many), Some(OfferError::TooMany(MAX_MODELS + 1)));
    }
}
