//! Ring 2: every plane, by the suite of all planes, each test in namespaces of its own. Needs root.

use drowse_tests::plane_tests;
use drowse_tests::planes::{copy, in_namespaces, splice};

plane_tests!(copy, in_namespaces, [everywhere, alone]);
plane_tests!(splice, in_namespaces, [everywhere, alone]);
