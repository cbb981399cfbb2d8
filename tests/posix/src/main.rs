//! Checks what a file system does against what POSIX and Linux say, as a program in a container.
//!
//! ```text
//! hull-posix run DIR OTHER   every check in a directory of its own below DIR; OTHER is another file
//!                            system. Prints `ok NAME` or `FAILED NAME: WHERE: WHY` for each.
//! hull-posix list DIR        tells all of what is below DIR, a line for each file
//! hull-posix hold FILE       takes a lock on all of FILE, says `held`, keeps it until its input ends
//! ```
//!
//! Here is what the packaged suites that run beside it (pjdfstest, fsx) leave out: names, modes and
//! errors of single system calls are pjdfstest's, mappings and random content fsx's.
//!
//! A check is a function that panics when it fails. Each has a thread of its own, so that it may
//! become another user.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "a failed check is a panic that says where"
)]

mod attributes;
mod content;
mod list;
mod locks;
mod names;
mod owners;
mod place;

use std::{
    env, fs,
    io::{self, Write},
    panic,
    path::Path,
    process::ExitCode,
    sync::Mutex,
    thread,
};

use rustix::{fs::Mode, process::umask};

use crate::place::Place;

/// A function that panics when the file system is wrong.
type Check = (&'static str, fn(&Place));

/// Names checks by their functions.
macro_rules! checks {
    ($($module:ident::{$($name:ident),* $(,)?}),* $(,)?) => {
        &[$($((stringify!($name), $module::$name)),*),*]
    };
}

const CHECKS: &[Check] = checks![
    names::{
        an_unlinked_file_lives_while_it_is_open,
        an_unlinked_file_is_changed_through_its_descriptor,
        an_unlinked_file_is_opened_again_and_not_linked,
        a_file_that_is_replaced_lives_while_it_is_open,
        a_removed_directory_is_empty_and_takes_nothing,
        a_large_directory_is_listed_whole_and_once,
        a_directory_is_emptied_while_it_is_listed,
        a_directory_grows_while_it_is_listed,
        a_listing_goes_back_to_where_it_was,
        a_listing_tells_types_and_inodes,
        a_listing_has_dot_and_dot_dot,
        names_are_any_bytes,
        hard_links_are_one_file,
        a_link_of_a_symlink_is_a_symlink,
        nothing_is_linked_or_renamed_to_another_file_system,
        renames_refuse_to_replace,
        renames_exchange,
        renames_leave_whiteouts,
        links_have_targets_of_any_length,
        threads_make_and_remove_the_same_names,
        deep_directories_are_walked_and_moved,
        files_without_names,
        descriptors_of_paths_alone,
    },
    content::{
        appending_goes_to_the_end_whoever_else_writes,
        appending_is_switched_on_and_off,
        threads_append_whole_lines,
        holes_are_found,
        holes_are_punched,
        ranges_are_zeroed,
        space_is_reserved_with_and_without_growth,
        reserving_refuses_what_it_must,
        files_are_copied_by_range,
        offsets_beyond_4_gib,
        truncation_is_seen_by_all,
        direct_io_is_coherent,
        everything_is_synced,
        programs_are_run,
        a_running_program_is_not_written,
        pipes_and_sockets_connect,
    },
    locks::{
        whole_file_locks_exclude,
        process_locks_exclude_other_processes,
        process_locks_go_with_any_descriptor,
        description_locks_exclude_by_range,
    },
    owners::{
        writing_takes_the_set_id_bits_away,
        truncating_takes_the_set_id_bits_away,
        opening_to_truncate_takes_the_set_id_bits_away,
        reserving_takes_the_set_id_bits_away,
        writing_takes_marks_of_mandatory_locks_away,
        a_new_owner_takes_the_set_id_bits_away,
        root_keeps_the_set_id_bits,
        groups_are_inherited,
        supplementary_groups_count,
        the_mask_applies,
        modes_bind_others,
        sticky_directories_protect,
        an_open_file_needs_no_permission,
        files_belong_to_who_makes_them,
    },
    attributes::{
        writing_changes_times,
        changes_of_attributes_change_ctime_alone,
        directories_change_with_their_entries,
        times_have_nanoseconds_and_any_year,
        times_of_a_symlink_are_its_own,
        extended_attributes_are_kept,
        extended_attributes_are_made_or_replaced,
        extended_attributes_have_sizes,
        extended_attributes_of_others_are_refused,
        trusted_attributes_are_roots,
        sizes_and_links_are_current,
        the_file_system_tells_its_size,
        acls_grant_and_deny,
        acls_are_inherited_in_place_of_the_mask,
    },
];

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["run", dir, other] => run(Path::new(dir), Path::new(other)),
        ["list", dir] => list::list(Path::new(dir)),
        ["hold", file] => locks::hold(Path::new(file)),
        _ => {
            eprintln!("hull-posix: run DIR OTHER | list DIR | hold FILE");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Where and why the last check failed.
static FAILURE: Mutex<String> = Mutex::new(String::new());

fn run(dir: &Path, other: &Path) {
    panic::set_hook(Box::new(|info| {
        let message = info.payload_as_str().unwrap_or_default().replace('\n', " ");
        let place = info.location().map(ToString::to_string);
        let mut failure = FAILURE.lock().unwrap();
        // The first of a check's threads tells the reason.
        if failure.is_empty() {
            *failure = format!("{}: {message}", place.unwrap_or_default());
        }
    }));
    umask(Mode::from_raw_mode(0o022));
    for (name, check) in CHECKS {
        let place = Place {
            dir: dir.join(name),
            other: other.to_owned(),
        };
        fs::create_dir(&place.dir).unwrap();
        let done = thread::scope(|scope| scope.spawn(|| check(&place)).join());
        let failure = std::mem::take(&mut *FAILURE.lock().unwrap());
        match done {
            Ok(()) => println!("ok {name}"),
            Err(_) => println!("FAILED {name}: {failure}"),
        }
        io::stdout().flush().unwrap();
    }
}
