//! Who set what: two plugins that set the same thing of a container are in conflict, unless the later
//! one says that it replaces what is there (it removes it first).

use std::fmt;

use holdfast_protos::nri::{CompoundFieldOwners, Field, FieldOwners, OwningPlugins};

/// Two plugins want the same.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("plugins {first:?} and {second:?} both set {what} of container {container}")]
pub struct Conflict {
    /// Of which container.
    pub container: String,
    /// The field, and the key in it.
    pub what: What,
    /// Who set it.
    pub first: String,
    /// Who set it then.
    pub second: String,
}

/// A field, and the key in it if it has keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct What(Field, Option<String>);

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.1 {
            Some(key) => write!(f, "{} {key:?}", self.0.as_str_name()),
            None => f.write_str(self.0.as_str_name()),
        }
    }
}

/// Owners of the fields of any number of containers.
#[derive(Clone, Debug, Default)]
pub struct Owners(OwningPlugins);

/// An owner's name with this before it: it removed the thing, and may set it anew.
const REMOVED: char = '-';

impl Owners {
    fn of(&mut self, container: &str) -> &mut FieldOwners {
        self.0.owners.entry(container.to_owned()).or_default()
    }

    fn slot(&mut self, container: &str, field: Field, key: Option<&str>) -> &mut String {
        let fields = self.of(container);
        match key {
            Some(key) => {
                let compound: &mut CompoundFieldOwners =
                    fields.compound.entry(field as i32).or_default();
                compound.owners.entry(key.to_owned()).or_default()
            }
            None => fields.simple.entry(field as i32).or_default(),
        }
    }

    /// `plugin` sets the field.
    pub fn claim(
        &mut self,
        container: &str,
        field: Field,
        key: Option<&str>,
        plugin: &str,
    ) -> Result<(), Conflict> {
        let owner = self.slot(container, field, key);
        let (by, removed) = match owner.strip_prefix(REMOVED) {
            Some(by) => (by, true),
            None => (owner.as_str(), false),
        };
        if by.is_empty() || removed && by == plugin {
            plugin.clone_into(owner);
            return Ok(());
        }
        Err(Conflict {
            container: container.to_owned(),
            what: What(field, key.map(str::to_owned)),
            first: by.to_owned(),
            second: plugin.to_owned(),
        })
    }

    /// `plugin` removes what another one has set.
    pub fn remove(&mut self, container: &str, field: Field, key: Option<&str>, plugin: &str) {
        let owner = self.slot(container, field, key);
        *owner = format!("{REMOVED}{plugin}");
    }

    /// `plugin` adds hooks, which any number may do.
    pub fn add_hooks(&mut self, container: &str, plugin: &str) {
        let owner = self.slot(container, Field::OciHooks, None);
        match owner.is_empty() {
            true => plugin.clone_into(owner),
            false => *owner = format!("{owner},{plugin}"),
        }
    }

    /// Who set a field without keys.
    pub fn simple(&self, container: &str, field: Field) -> Option<&str> {
        let owner = self.0.owners.get(container)?.simple.get(&(field as i32))?;
        Some(owner)
    }

    /// The keys of a field, each with who set it.
    pub fn keys(&self, container: &str, field: Field) -> Vec<(&str, &str)> {
        let compound = self.0.owners.get(container).and_then(|of| of.compound.get(&(field as i32)));
        let owners = compound.map(|compound| &compound.owners).into_iter().flatten();
        owners.map(|(key, owner)| (key.as_str(), owner.as_str())).collect()
    }

    /// As the protocol has it.
    pub fn message(&self) -> &OwningPlugins {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_a_conflict_unless_it_removed_what_was_there() {
        let mut owners = Owners::default();
        owners.claim("c", Field::Env, Some("A"), "10-a").unwrap();
        owners.claim("c", Field::Env, Some("B"), "20-b").unwrap();
        owners.claim("d", Field::Env, Some("A"), "20-b").unwrap();
        let conflict = owners.claim("c", Field::Env, Some("A"), "20-b").unwrap_err();
        assert_eq!(
            conflict.to_string(),
            "plugins \"10-a\" and \"20-b\" both set Env \"A\" of container c"
        );
        owners.remove("c", Field::Env, Some("A"), "20-b");
        assert!(owners.claim("c", Field::Env, Some("A"), "30-c").is_err());
        owners.claim("c", Field::Env, Some("A"), "20-b").unwrap();
        assert!(owners.claim("c", Field::Env, Some("A"), "10-a").is_err());
        assert_eq!(owners.keys("c", Field::Env), [("A", "20-b"), ("B", "20-b")]);
    }

    #[test]
    fn hooks_are_everybodys() {
        let mut owners = Owners::default();
        assert_eq!(owners.simple("c", Field::OciHooks), None);
        owners.add_hooks("c", "10-a");
        owners.add_hooks("c", "20-b");
        assert_eq!(owners.simple("c", Field::OciHooks), Some("10-a,20-b"));
    }
}
