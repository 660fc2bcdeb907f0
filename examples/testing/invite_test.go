package invite

import (
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

// start returns the service under test and the relay that it talks to.
func start(t *testing.T) (*Service, *smtptest.Server) {
	t.Helper()
	relay := smtptest.New(t)
	return &Service{Mail: relay.Client(t), From: "shop@example.com"}, relay
}

func TestInvite(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault smtptest.Fault
		want  State
		mails int // at the relay
		why   string
	}{
		{
			name:  "no such mailbox",
			fault: smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"},
			want:  Bounced,
			why:   "a 550 to RCPT is about the address, and sending again cannot help",
		},
		{
			name:  "greylisting",
			fault: smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 try again later"},
			want:  Waiting,
			why:   "a 4xx reply is temporary",
		},
		{
			name:  "lost before the final dot",
			fault: smtptest.Fault{At: smtptest.Mail, Drop: true},
			want:  Sent,
			mails: 1,
			why:   "nothing can have been accepted, so the client retries",
		},
		{
			name:  "lost after the final dot",
			fault: smtptest.Fault{At: smtptest.FinalDot, Drop: true},
			want:  Unclear,
			why:   "the relay may have accepted the mail before the connection was lost",
		},
		{
			name:  "refused after the final dot",
			fault: smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 looks like spam"},
			want:  Waiting,
			why:   "the mailbox is fine, the mail is not: it waits until a person has read the log",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			service, relay := start(t)
			fault := relay.Fault(test.fault)
			got, err := service.Invite(t.Context(), "ann@example.org")
			if got != test.want {
				t.Errorf("got %v (%v), want %v: %s", got, err, test.want, test.why)
			}
			if n := len(relay.Messages()); n != test.mails {
				t.Errorf("the relay has %d mails, want %d", n, test.mails)
			}
			if fault.Hits() == 0 {
				t.Error("the fault did not strike: this test shows nothing")
			}
		})
	}
}

func TestInvitationIsAddressedOnlyToTheGuest(t *testing.T) {
	service, relay := start(t)
	if _, err := service.Invite(t.Context(), "ann@example.org"); err != nil {
		t.Fatal(err)
	}
	mails := relay.Messages()
	if len(mails) != 1 {
		t.Fatalf("the relay has %d mails, want 1", len(mails))
	}
	if m := mails[0]; m.From != "shop@example.com" || len(m.To) != 1 || m.To[0] != "ann@example.org" {
		t.Errorf("envelope: from %q to %q", m.From, m.To)
	}
	for _, field := range []string{"\r\nTo: <ann@example.org>\r\n", "\r\nMessage-ID: <", "\r\nList-Unsubscribe: <https://example.com/unsubscribe?address=ann%40example.org>\r\n"} {
		if !strings.Contains(string(mails[0].Body), field) {
			t.Errorf("the header has no %q:\n%s", field, mails[0].Body)
		}
	}
}
