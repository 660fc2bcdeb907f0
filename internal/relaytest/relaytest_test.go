// Tests that the relay calls Answer as documented and sends what Answer returns.
package relaytest

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

func TestRelayCallsAnswerForEachLineAndSendsIt(t *testing.T) {
	for _, window := range []int{0, 16} {
		synctest.Test(t, func(t *testing.T) {
			var lines []string
			var body strings.Builder
			relay := &Relay{Window: window, Body: &body, Answer: func(n int, line string) string {
				lines = append(lines, line)
				if line == "NOOP" {
					return "" // sends nothing
				}
				return Agree("250-PIPELINING\n250 CHUNKING", line)
			}}
			conn, err := relay.Dial(context.Background(), "tcp", "")
			if err != nil {
				t.Fatal(err)
			}
			go io.WriteString(conn, "EHLO x\r\nNOOP\r\nDATA\r\nSubject: a line that is longer than sixteen\r\n\r\n..\r\n.\r\nBDAT 8\r\nQUIT\r\n\r\nBDAT 3 LAST\r\nabcQUIT\r\n")
			said, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			if want := []string{"", "EHLO x", "NOOP", "DATA", ".", "BDAT 8", "BDAT 3 LAST", "QUIT"}; !slices.Equal(lines, want) {
				t.Errorf("Answer was called with %q, want %q", lines, want)
			}
			if want := "220 hi\r\n250-hi\r\n250-PIPELINING\r\n250 CHUNKING\r\n354 go\r\n250 ok\r\n503 MAIL first\r\n250 ok\r\n221 bye\r\n"; string(said) != want {
				t.Errorf("the relay sent %q, want %q", said, want)
			}
			if want := "Subject: a line that is longer than sixteen\r\n\r\n..\r\nQUIT\r\n\r\nabc"; body.String() != want {
				t.Errorf("the body is %q, want %q", body.String(), want)
			}
			conn.Close()
		})
	}
}

func TestHangupClosesAfterTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := Dial(0, func(n int, _ string) string { return strings.Repeat("554 no\n", n-1) + "554 no" + Hangup })
		for _, want := range []string{"554 no\r\n", "554 no\r\n554 no\r\n"} {
			conn, err := dial(context.Background(), "tcp", "")
			if err != nil {
				t.Fatal(err)
			}
			if said, err := io.ReadAll(conn); err != nil || string(said) != want {
				t.Errorf("the relay sent %q, then %v, want %q, then EOF", said, err, want)
			}
			conn.Close()
		}
	})
}
