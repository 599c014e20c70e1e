//! The proof: every promise of the README, tried against real servers, real TLS and the real model.
//!
//! Each test brings up a system of its own and takes it down; `git grep SRS-` and `git grep REQ_` find the
//! test of a requirement.

mod access;
mod acme;
mod api;
mod architecture;
mod assertions;
mod audit;
mod balancer;
mod batches;
mod canary;
mod certificates;
mod commands;
mod dead;
mod decoding;
mod definitions;
mod device;
mod encryption;
mod fairness;
mod faults;
mod fuzz;
mod golden;
mod https;
mod idempotency;
mod identity;
mod images;
mod keys;
mod limits;
mod models;
mod openapi;
mod overload;
mod privacy;
mod provider;
mod registration;
mod retention;
mod routes;
mod sealing;
mod search;
mod submit;
mod survival;
mod sweeping;
mod up;
mod validation;
