//! Ring 2: every plane, by the suite of all planes, each test in namespaces of its own. Needs root.

use drowse_tests::plane_tests;
use drowse_tests::planes::{copy, in_namespaces, sockmap, sockmap_at_once, sockmap_ends, splice};

plane_tests!(copy, in_namespaces, [everywhere, alone]);
plane_tests!(splice, in_namespaces, [everywhere, alone]);
plane_tests!(sockmap, in_namespaces, [everywhere, alone, asleep, in_kernel]);
plane_tests!(sockmap_at_once, in_namespaces, [everywhere, alone, asleep, in_kernel]);
plane_tests!(sockmap_ends, in_namespaces, [everywhere, alone, asleep, in_kernel, cut_short]);
