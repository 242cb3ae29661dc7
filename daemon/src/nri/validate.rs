//! The built-in validator: what the configuration does not let plugins adjust, and which plugins must
//! be there (fail closed).

use holdfast_protos::nri::{
    Container, Field, PodSandbox, SecurityProfile, security_profile::ProfileType,
};

use super::owners::Owners;
use crate::config::NriValidator;

/// Names the plugins that must be there, as a YAML list; the peers' annotation.
pub(super) const REQUIRED: &str = "required-plugins.noderesource.dev";

/// Why a container is not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plugin that must be there is not.
    #[error(
        "required NRI plugin {} not there ({by}): see `holdfast info` for those that are",
        plural(missing)
    )]
    Missing {
        /// Which.
        missing: Vec<String>,
        /// Who requires them.
        by: String,
    },
    /// An annotation that says nothing.
    #[error("annotation {key}: {value:?} is not {rule}")]
    Annotation {
        /// Its key.
        key: String,
        /// What it says.
        value: String,
        /// What it should say.
        rule: &'static str,
    },
    /// The configuration forbids it.
    #[error("NRI plugin {plugins} may not adjust {what} (nri.validator.{key})")]
    Forbidden {
        /// Who did.
        plugins: String,
        /// What.
        what: String,
        /// The key that forbids it.
        key: &'static str,
    },
}

fn plural(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

/// A pod's annotation for one of its containers: the most particular one counts.
fn annotation<'a>(pod: &'a PodSandbox, key: &str, container: &str) -> Option<(String, &'a str)> {
    [format!("{key}/container.{container}"), format!("{key}/pod"), key.to_owned()]
        .into_iter()
        .find_map(|key| pod.annotations.get(&key).map(|value| (key.clone(), value.as_str())))
}

/// Whether the plugins that must be there are. `present` are names with their index ("10-name").
pub(super) fn required(
    config: &NriValidator,
    pod: &PodSandbox,
    container: &str,
    present: &[String],
) -> Result<(), Error> {
    let tolerate = &config.tolerate_missing_plugins_annotation;
    if !tolerate.is_empty()
        && let Some((key, value)) = annotation(pod, tolerate, container)
    {
        match value {
            "true" | "1" => return Ok(()),
            "false" | "0" => {}
            _ => {
                let value = value.to_owned();
                return Err(Error::Annotation { key, value, rule: "true or false" });
            }
        }
    }
    let is_missing = |name: &&String| {
        !present.iter().any(|known| {
            known == *name || known.split_once('-').is_some_and(|(_, base)| base == name.as_str())
        })
    };
    let missing = |names: &[String], by: String| {
        let missing: Vec<_> = names.iter().filter(is_missing).cloned().collect();
        if missing.is_empty() { Ok(()) } else { Err(Error::Missing { missing, by }) }
    };
    missing(&config.required_plugins, "nri.validator.required_plugins".to_owned())?;
    if let Some((key, value)) = annotation(pod, REQUIRED, container) {
        let names: Vec<String> = serde_yaml_ng::from_str(value).map_err(|_| {
            let rule = "a list of plugins' names, as in [\"one\", \"two\"]";
            Error::Annotation { key: key.clone(), value: value.to_owned(), rule }
        })?;
        missing(&names, format!("annotation {key}"))?;
    }
    Ok(())
}

/// Whether the plugins kept to what they may adjust. `container` as it was before they did.
pub(super) fn adjusted(
    config: &NriValidator,
    container: &Container,
    owners: &Owners,
) -> Result<(), Error> {
    let id = &container.id;
    let forbidden = |plugins: &str, what: &str, key| {
        let (plugins, what) = (format!("{plugins:?}"), what.to_owned());
        Err(Error::Forbidden { plugins, what, key })
    };
    if config.reject_oci_hook_adjustment
        && let Some(plugins) = owners.simple(id, Field::OciHooks)
    {
        return forbidden(plugins, "OCI hooks", "reject_oci_hook_adjustment");
    }
    if let Some(plugin) = owners.simple(id, Field::SeccompPolicy) {
        let profile = container.linux.as_ref().and_then(|linux| linux.seccomp_profile.as_ref());
        let kind = profile.map_or(ProfileType::Unconfined, SecurityProfile::profile_type);
        let (reject, what, key) = match kind {
            ProfileType::RuntimeDefault => (
                config.reject_runtime_default_seccomp_adjustment,
                "the default seccomp profile",
                "reject_runtime_default_seccomp_adjustment",
            ),
            ProfileType::Unconfined => (
                config.reject_unconfined_seccomp_adjustment,
                "the seccomp profile of an unconfined container",
                "reject_unconfined_seccomp_adjustment",
            ),
            ProfileType::Localhost => (
                config.reject_custom_seccomp_adjustment,
                "a seccomp profile of the user's own",
                "reject_custom_seccomp_adjustment",
            ),
        };
        if reject {
            return forbidden(plugin, what, key);
        }
    }
    for (reject, field, what, key) in [
        (
            config.reject_namespace_adjustment,
            Field::Namespace,
            "namespaces",
            "reject_namespace_adjustment",
        ),
        (config.reject_sysctl_adjustment, Field::Sysctl, "sysctls", "reject_sysctl_adjustment"),
    ] {
        let keys = owners.keys(id, field);
        if reject && let Some((_, plugin)) = keys.first() {
            let names: Vec<_> = keys.iter().map(|(key, _)| *key).collect();
            return forbidden(plugin, &format!("{what} ({})", names.join(", ")), key);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use holdfast_protos::nri::LinuxContainer;

    use super::*;

    fn pod(annotations: &[(&str, &str)]) -> PodSandbox {
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        PodSandbox { annotations: annotations.collect(), ..PodSandbox::default() }
    }

    #[test]
    fn required_plugins_are_by_configuration_or_annotation() {
        let mut config = NriValidator::default();
        let present = ["10-cpu".to_owned(), "20-a-b".to_owned()];
        let check = |config: &NriValidator, pod: &PodSandbox| {
            required(config, pod, "main", &present).map_err(|error| error.to_string())
        };
        assert_eq!(check(&config, &pod(&[])), Ok(()));
        config.required_plugins = vec!["cpu".into(), "20-a-b".into()];
        assert_eq!(check(&config, &pod(&[])), Ok(()));
        config.required_plugins = vec!["b".into(), "cpu".into(), "30-cpu".into()];
        assert_eq!(
            check(&config, &pod(&[])).unwrap_err(),
            "required NRI plugin \"b\", \"30-cpu\" are not there (nri.validator.required_plugins): \
             see `holdfast info` for those that are"
        );
        config.tolerate_missing_plugins_annotation = "tolerate".into();
        assert_eq!(check(&config, &pod(&[("tolerate/container.main", "true")])), Ok(()));
        assert!(check(&config, &pod(&[("tolerate/container.other", "true")])).is_err());
        assert!(check(&config, &pod(&[("tolerate", "perhaps")])).unwrap_err().contains("perhaps"));
        config.required_plugins.clear();
        assert_eq!(check(&config, &pod(&[(REQUIRED, "[cpu]")])), Ok(()));
        let particular = format!("{REQUIRED}/container.main");
        let missing = check(&config, &pod(&[(REQUIRED, "[cpu]"), (&particular, "- gpu")]));
        assert!(missing.unwrap_err().contains("\"gpu\" is not there (annotation required-plugins"));
        assert!(check(&config, &pod(&[(REQUIRED, "{")])).is_err());
    }

    #[test]
    fn what_is_forbidden_names_who_did_it_and_the_key() {
        let mut owners = Owners::default();
        let mut container = Container { id: "c".into(), ..Container::default() };
        owners.add_hooks("c", "10-a");
        owners.claim("c", Field::SeccompPolicy, None, "10-a").unwrap();
        owners.claim("c", Field::Sysctl, Some("net.x"), "20-b").unwrap();
        let mut config = NriValidator::default();
        let check = |config: &NriValidator, container: &Container| {
            adjusted(config, container, &owners).map_err(|error| error.to_string())
        };
        assert_eq!(check(&config, &container), Ok(()));
        config.reject_sysctl_adjustment = true;
        assert_eq!(
            check(&config, &container).unwrap_err(),
            "NRI plugin \"20-b\" may not adjust sysctls (net.x) (nri.validator.reject_sysctl_adjustment)"
        );
        config.reject_runtime_default_seccomp_adjustment = true;
        assert!(check(&config, &container).unwrap_err().contains("sysctls"));
        let profile = SecurityProfile {
            profile_type: ProfileType::RuntimeDefault as i32,
            ..SecurityProfile::default()
        };
        container.linux =
            Some(LinuxContainer { seccomp_profile: Some(profile), ..LinuxContainer::default() });
        assert!(check(&config, &container).unwrap_err().contains("default seccomp profile"));
        config.reject_oci_hook_adjustment = true;
        assert!(check(&config, &container).unwrap_err().contains("OCI hooks"));
    }
}
