//go:build race

package hostile

// manyRecipients are refused with 60 KB each, which is slow under the race detector.
const manyRecipients = 1000
