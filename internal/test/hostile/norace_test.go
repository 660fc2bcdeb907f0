//go:build !race

package hostile

// manyRecipients are refused with 60 KB each.
const manyRecipients = 5000
