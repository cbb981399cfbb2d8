//! What several plugins want together. Each sees what those before it changed; a part that one of them set is its
//! own, unless another removes it before it sets it too.

use std::collections::{BTreeMap, HashMap};

use hull_proto_nri::{
    CompoundFieldOwners, Container, ContainerAdjustment, ContainerUpdate, Field, FieldOwners,
    LinuxContainerAdjustment, OwningPlugins,
};
use hull_spec::{resources::merge, spec::Resources};

use crate::{
    describe,
    limits::{NODE_DEVICES, Part, Refused, limits},
};

/// Who set which part of which container.
#[derive(Debug, Default)]
struct Owners(BTreeMap<(String, i32, String), String>);

impl Owners {
    fn claim(&mut self, container: &str, (field, key): Part, plugin: &str) -> Result<(), Refused> {
        let part = (container.to_owned(), field as i32, key);
        match self.0.get(&part) {
            Some(owner) if owner != plugin => {
                let what = format!("{field:?} {}", part.2);
                let reason = format!("plugin {owner} sets it too");
                Err(Refused::new(what.trim_end(), reason))
            }
            _ => {
                self.0.insert(part, plugin.to_owned());
                Ok(())
            }
        }
    }

    /// Takes a part from whoever has it.
    fn take(&mut self, container: &str, field: Field, key: &str, plugin: &str) {
        let part = (container.to_owned(), field as i32, key.to_owned());
        self.0.insert(part, plugin.to_owned());
    }

    fn told(&self) -> OwningPlugins {
        let mut told = OwningPlugins::default();
        for ((container, field, key), plugin) in &self.0 {
            let owners: &mut FieldOwners = told.owners.entry(container.clone()).or_default();
            if key.is_empty() {
                owners.simple.insert(*field, plugin.clone());
            } else {
                let compound: &mut CompoundFieldOwners = owners.compound.entry(*field).or_default();
                compound.owners.insert(key.clone(), plugin.clone());
            }
        }
        told
    }
}

/// New limits of a container that a plugin was not asked about.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Update {
    pub(crate) container: String,
    pub(crate) limits: Resources,
    /// Whether nothing else fails with it.
    pub(crate) ignore_failure: bool,
}

/// What the plugins want.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    owners: Owners,
    /// Of the container that is to be created.
    pub(crate) adjust: ContainerAdjustment,
    /// The limits among that.
    pub(crate) limits: Resources,
    /// In the order in which they were first named.
    pub(crate) updates: Vec<Update>,
}

impl Outcome {
    /// Who set what.
    pub(crate) fn owners(&self) -> OwningPlugins {
        self.owners.told()
    }

    /// Takes what a plugin wants of a container that is to be created, which changes what the next one is told
    /// of it.
    ///
    /// # Errors
    /// For what can't be in a VM, and for parts that another plugin has set.
    pub(crate) fn adjust(
        &mut self,
        plugin: &str,
        asked: ContainerAdjustment,
        container: &mut Container,
    ) -> Result<(), Refused> {
        refuse(&asked)?;
        let id = container.id.clone();
        let owners = &mut self.owners;
        let mut claim = |field, key: &str| owners.claim(&id, (field, key.to_owned()), plugin);

        let removed: Vec<&str> = asked
            .annotations
            .keys()
            .filter_map(|it| removal(it))
            .collect();
        for key in &removed {
            container.annotations.remove(*key);
            self.adjust.annotations.remove(*key);
        }
        for (key, value) in asked
            .annotations
            .iter()
            .filter(|(key, _)| removal(key).is_none())
        {
            if !removed.contains(&key.as_str()) {
                claim(Field::Annotations, key)?;
            }
            container.annotations.insert(key.clone(), value.clone());
            self.adjust.annotations.insert(key.clone(), value.clone());
        }
        for key in &removed {
            self.owners.take(&id, Field::Annotations, key, plugin);
            if !asked.annotations.contains_key(*key) {
                let mark = format!("-{key}");
                self.adjust.annotations.insert(mark, String::new());
            }
        }

        let keys: Vec<&str> = asked
            .mounts
            .iter()
            .map(|it| it.destination.as_str())
            .collect();
        self.claim_list(&id, Field::Mounts, &keys, plugin)?;
        list(
            &mut self.adjust.mounts,
            &asked.mounts,
            |it| &it.destination,
            true,
        );
        list(
            &mut container.mounts,
            &asked.mounts,
            |it| &it.destination,
            false,
        );

        let keys: Vec<&str> = asked.env.iter().map(|it| it.key.as_str()).collect();
        self.claim_list(&id, Field::Env, &keys, plugin)?;
        list(&mut self.adjust.env, &asked.env, |it| &it.key, true);
        for variable in &asked.env {
            let key = removal(&variable.key).unwrap_or(&variable.key);
            let is_it = |it: &String| it.split_once('=').map_or(it.as_str(), |(key, _)| key) == key;
            container.env.retain(|it| !is_it(it));
        }
        let set = asked.env.iter().filter(|it| removal(&it.key).is_none());
        container
            .env
            .extend(set.map(|it| format!("{}={}", it.key, it.value)));

        if let [first, rest @ ..] = asked.args.as_slice() {
            // An empty word in front: whatever another plugin wanted.
            let args = if first.is_empty() { rest } else { &asked.args };
            if first.is_empty() {
                self.owners.take(&id, Field::Args, "", plugin);
            } else {
                self.owners
                    .claim(&id, (Field::Args, String::new()), plugin)?;
            }
            self.adjust.args = args.to_vec();
            container.args = args.to_vec();
        }

        for limit in &asked.rlimits {
            self.owners
                .claim(&id, (Field::Rlimits, limit.type_.clone()), plugin)?;
        }
        list(
            &mut self.adjust.rlimits,
            &asked.rlimits,
            |it| &it.type_,
            false,
        );
        list(
            &mut container.rlimits,
            &asked.rlimits,
            |it| &it.type_,
            false,
        );

        if let Some(linux) = asked.linux.into_option() {
            self.adjust_linux(plugin, &linux, container)?;
        }
        Ok(())
    }

    fn adjust_linux(
        &mut self,
        plugin: &str,
        asked: &LinuxContainerAdjustment,
        container: &mut Container,
    ) -> Result<(), Refused> {
        let told = container.linux.mut_or_insert_default();
        let all = self.adjust.linux.mut_or_insert_default();
        if let Some(adj) = asked.oom_score_adj.as_ref() {
            let part = (Field::OomScoreAdj, String::new());
            self.owners.claim(&container.id, part, plugin)?;
            told.oom_score_adj = Some(adj.clone()).into();
            all.oom_score_adj = Some(adj.clone()).into();
        }
        let Some(asked) = asked.resources.as_ref() else {
            return Ok(());
        };
        let (mut limits, parts) = limits(asked)?;
        for part in parts {
            self.owners.claim(&container.id, part, plugin)?;
        }
        if limits.memory_limit_bytes != 0 && limits.memory_swap_limit_bytes == 0 {
            // As with a request that names none: no swap.
            limits.memory_swap_limit_bytes = limits.memory_limit_bytes;
        }
        self.limits = merge(&self.limits, &limits);
        all.resources = Some(describe::resources(&self.limits)).into();
        let before = told.resources.get_or_default();
        // What was told to the plugin came from limits, so it can be read as such.
        let before = crate::limits::limits(before).map(|(limits, _)| limits);
        let now = merge(&before.unwrap_or_default(), &limits);
        told.resources = Some(describe::resources(&now)).into();
        Ok(())
    }

    fn claim_list(
        &mut self,
        container: &str,
        field: Field,
        keys: &[&str],
        plugin: &str,
    ) -> Result<(), Refused> {
        // What is removed and set in one is taken from whoever set it.
        for key in keys.iter().filter_map(|key| removal(key)) {
            self.owners.take(container, field, key, plugin);
        }
        for key in keys.iter().filter(|key| removal(key).is_none()) {
            let part = (field, (*key).to_owned());
            self.owners.claim(container, part, plugin)?;
        }
        Ok(())
    }

    /// Takes updates that a plugin wants of containers, but for those of the one that is being updated by a
    /// client: its limits are changed in place.
    ///
    /// # Errors
    /// As of [`Outcome::adjust`], unless the failure is to be ignored; and for the container that is created.
    pub(crate) fn update(
        &mut self,
        plugin: &str,
        asked: Vec<ContainerUpdate>,
        created: Option<&str>,
        mut updated: Option<(&str, &mut Resources)>,
    ) -> Result<(), Refused> {
        for update in asked {
            let id = update.container_id.as_str();
            if created == Some(id) {
                let reason = "the container is being created: its adjustment is for that";
                return Err(Refused::new(format!("update of {id}"), reason));
            }
            let claimed = limits(update.linux.resources.get_or_default());
            let claimed = claimed.and_then(|(limits, parts)| {
                for part in parts {
                    self.owners.claim(id, part, plugin)?;
                }
                Ok(limits)
            });
            let limits = match claimed {
                Ok(limits) => limits,
                Err(_) if update.ignore_failure => continue,
                Err(refused) => return Err(refused),
            };
            if let Some((_, now)) = updated.as_mut().filter(|(of, _)| *of == id) {
                **now = merge(now, &limits);
                continue;
            }
            match self.updates.iter_mut().find(|it| it.container == id) {
                Some(known) => {
                    known.limits = merge(&known.limits, &limits);
                    known.ignore_failure &= update.ignore_failure;
                }
                None => self.updates.push(Update {
                    container: id.to_owned(),
                    limits,
                    ignore_failure: update.ignore_failure,
                }),
            }
        }
        Ok(())
    }
}

/// What is to be removed, if it is that.
pub(crate) fn removal(key: &str) -> Option<&str> {
    key.strip_prefix('-')
}

/// Puts entries in the place of those with their keys. Marks of removals stay in the list if `marks`.
fn list<T: Clone>(all: &mut Vec<T>, asked: &[T], key: fn(&T) -> &String, marks: bool) {
    let plain = |entry: &T| {
        let key = key(entry);
        removal(key).unwrap_or(key).to_owned()
    };
    let named: HashMap<String, bool> = asked
        .iter()
        .map(|entry| (plain(entry), removal(key(entry)).is_none()))
        .fold(HashMap::new(), |mut all, (name, set)| {
            *all.entry(name).or_default() |= set;
            all
        });
    all.retain(|entry| !named.contains_key(&plain(entry)));
    let stays = |entry: &&T| removal(key(entry)).is_none() || (marks && !named[&plain(entry)]);
    all.extend(asked.iter().filter(stays).cloned());
}

/// Refuses what can't be in a VM.
fn refuse(asked: &ContainerAdjustment) -> Result<(), Refused> {
    const NONE: &str = "there is none in a VM";
    if asked.hooks.is_some() && asked.hooks.get_or_default() != &hull_proto_nri::Hooks::default() {
        let reason = "hooks are programs of the node, and the container is in a VM";
        return Err(Refused::new("hooks", reason));
    }
    if !asked.CDI_devices.is_empty() {
        return Err(Refused::new("CDI_devices", NODE_DEVICES));
    }
    let linux = asked.linux.get_or_default();
    for (field, is_asked, reason) in [
        ("linux.devices", !linux.devices.is_empty(), NODE_DEVICES),
        (
            "linux.cgroups_path",
            !linux.cgroups_path.is_empty(),
            "the container's cgroup is the guest's",
        ),
        (
            "linux.namespaces",
            !linux.namespaces.is_empty(),
            "the container's namespaces are the guest's",
        ),
        (
            "linux.sysctl",
            !linux.sysctl.is_empty(),
            "sysctls are the pod's, which a container can't change",
        ),
        (
            "linux.net_devices",
            !linux.net_devices.is_empty(),
            "network devices are the node's, and a VM has its own",
        ),
        (
            "linux.seccomp_policy",
            linux.seccomp_policy.is_some(),
            "the profile is the request's",
        ),
        ("linux.rdt", linux.rdt.is_some(), NONE),
        ("linux.memory_policy", linux.memory_policy.is_some(), NONE),
        (
            "linux.io_priority",
            linux.io_priority.is_some(),
            "priorities are not passed on to the guest",
        ),
        (
            "linux.scheduler",
            linux.scheduler.is_some(),
            "policies of scheduling are not passed on to the guest",
        ),
    ] {
        if is_asked {
            return Err(Refused::new(field, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
