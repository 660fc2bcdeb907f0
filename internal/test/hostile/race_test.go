//go:build race

package hostile

// manyRecipients are refused with 60 KB each, which takes the race detector long.
const manyRecipients = 1000
