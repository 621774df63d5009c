//! Ring 1: the planes that need no privileges, by the suite of all planes.

use drowse_tests::plane_tests;
use drowse_tests::planes::{copy, here, splice};

plane_tests!(copy, here, [everywhere]);
plane_tests!(splice, here, [everywhere]);
