package smtprelay_test

import (
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

// Each of these tests stands for a fault that was reported of another client; the table in TESTING.md tells which.

// A sender who has the next message ready as soon as one is accepted uses one connection, and not one more each time that
// he is faster than the bookkeeping.
func TestLoneSenderNeverOpensASecondConnection(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxMessages = -1 })
		cfg := relay.Config()
		cfg.Limits.MaxMessagesPerConn = -1
		client := newClient(t, cfg)
		sendNumbered(t, client, 2000, 1)
		want(t, "connections opened", len(relay.Conns()), 1)
	})
}
