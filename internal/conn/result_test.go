package conn

// Tests of what the replies of a transaction mean together.

import (
	"testing"

	"github.com/smtprelay/smtprelay/internal/wire"
)

func TestNobodyIsAcceptedWhereMAILWasRefused(t *testing.T) {
	r := Replies{Mail: wire.Reply{Code: 503}, Rcpt: []wire.Reply{{Code: 250}, {Code: 550}}}
	if got := r.Accepted(); got != 0 {
		t.Errorf("MAIL refused: %d recipients accepted, want 0: the relay means those of another envelope", got)
	}
	if got := r.Agreed(); got != 1 {
		t.Errorf("%d RCPTs agreed to, want 1", got)
	}
	r.Mail.Code = 250
	if got := r.Accepted(); got != 1 {
		t.Errorf("MAIL accepted: %d recipients accepted, want 1", got)
	}
}
