// Here belongs how messages are shared among workers.
package natsstore

import (
	"fmt"
	"testing"
)

func TestWorkerThatComesTakesItsShareFromAllAndMovesNothingBetweenThem(t *testing.T) {
	const messages = 30000
	three, four := []string{"ann", "bob", "cy"}, []string{"ann", "bob", "cy", "dee"}
	count := map[string]int{}
	for i := range messages {
		x := newIndex()
		token := tokenOf(fmt.Sprint(i))
		x.add(token, 1, meta{})
		hash := x.entries[token].hash
		before, after := owner(three, hash), owner(four, hash)
		if after != "dee" && after != before {
			t.Fatalf("message %d went from %s to %s", i, before, after)
		}
		count[after]++
	}
	for _, w := range four {
		if n := count[w]; n < messages/5 || n > messages/3 {
			t.Errorf("%s has %d of %d", w, n, messages)
		}
	}
}
