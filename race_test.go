//go:build race

package smtprelay_test

// largeBody is the size of the body that must pass in constant memory. The race detector looks at each octet of it: a part of
// 1 GiB will do, which is many times what may be held.
const largeBody = 128 << 20
