package wire

import (
	"strings"
	"testing"
	"time"
)

func TestMailIsWrittenWithItsParameters(t *testing.T) {
	text := func(s string) *string { return &s }
	priority := func(n int) *int { return &n }
	for _, tt := range []struct {
		why, from string
		opts      MailParams
		want      string
	}{
		{"the path alone", "a@x.example", MailParams{}, "MAIL FROM:<a@x.example>"},
		{"the null reverse-path (RFC 5321, 4.5.5)", "", MailParams{}, "MAIL FROM:<>"},
		{"a quoted part before @ as it is", `"a b"@x.example`, MailParams{}, `MAIL FROM:<"a b"@x.example>`},
		{"8BITMIME (RFC 6152)", "a@x.example", MailParams{Body: "8BITMIME"}, "MAIL FROM:<a@x.example> BODY=8BITMIME"},
		{"SIZE (RFC 1870, 6)", "a@x.example", MailParams{Size: 500000}, "MAIL FROM:<a@x.example> SIZE=500000"},
		{"SMTPUTF8 (RFC 6531, 3.4)", "é@x.example", MailParams{UTF8: true}, "MAIL FROM:<é@x.example> SMTPUTF8"},
		{"REQUIRETLS (RFC 8689, 2)", "a@x.example", MailParams{RequireTLS: true}, "MAIL FROM:<a@x.example> REQUIRETLS"},
		{"the example of RFC 3461, 10.2", "Alice@Example.ORG", MailParams{Return: "HDRS", EnvelopeID: "QQ314159"},
			"MAIL FROM:<Alice@Example.ORG> RET=HDRS ENVID=QQ314159"},
		{"ENVID is xtext (RFC 3461, 4)", "a@x.example", MailParams{EnvelopeID: "a+b=c d~é\x7f"},
			"MAIL FROM:<a@x.example> ENVID=a+2Bb+3Dc+20d~+C3+A9+7F"},
		{"nothing gets out of ENVID", "a@x.example", MailParams{EnvelopeID: "x\r\nRCPT TO:<b@y.example>\x00"},
			"MAIL FROM:<a@x.example> ENVID=x+0D+0ARCPT+20TO:<b@y.example>+00"},
		{"the example of RFC 4954, 5", "e=mc2@example.com", MailParams{Auth: text("e=mc2@example.com")},
			"MAIL FROM:<e=mc2@example.com> AUTH=e+3Dmc2@example.com"},
		{"an unknown submitter (RFC 4954, 5)", "a@x.example", MailParams{Auth: text("")}, "MAIL FROM:<a@x.example> AUTH=<>"},
		{"nothing gets out of AUTH", "a@x.example", MailParams{Auth: text("x\n ")}, "MAIL FROM:<a@x.example> AUTH=x+0A+20"},
		{"BY, or a notice (RFC 2852, 4)", "a@x.example", MailParams{By: By{Mode: "N", Seconds: -120}}, "MAIL FROM:<a@x.example> BY=-120;N"},
		{"BY, or return, with a trace", "a@x.example", MailParams{By: By{Mode: "R", Seconds: 3600, Trace: true}}, "MAIL FROM:<a@x.example> BY=3600;RT"},
		{"a priority (RFC 6710, 3)", "a@x.example", MailParams{Priority: priority(-9)}, "MAIL FROM:<a@x.example> MT-PRIORITY=-9"},
		{"priority 0 is one too", "a@x.example", MailParams{Priority: priority(0)}, "MAIL FROM:<a@x.example> MT-PRIORITY=0"},
		{"all of them", "a@x.example",
			MailParams{Body: "7BIT", Size: 1, UTF8: true, Return: "FULL", EnvelopeID: "e", RequireTLS: true, Auth: text(""),
				By: By{Mode: "N"}, Priority: priority(1)},
			"MAIL FROM:<a@x.example> BODY=7BIT SIZE=1 SMTPUTF8 RET=FULL ENVID=e REQUIRETLS AUTH=<> BY=0;N MT-PRIORITY=1"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			if got := string(AppendMail([]byte("RSET\r\n"), tt.from, &tt.opts)); got != "RSET\r\n"+tt.want+"\r\n" {
				t.Errorf("got %q, want %q after RSET", got, tt.want)
			}
		})
	}
}

func TestRcptIsWrittenWithItsParameters(t *testing.T) {
	for _, tt := range []struct {
		why, to string
		opts    RcptParams
		utf8    bool
		want    string
	}{
		{"the path alone", "b@y.example", RcptParams{}, false, "RCPT TO:<b@y.example>"},
		{"the first example of RFC 3461, 10.2", "Bob@Example.COM",
			RcptParams{Notify: []string{"SUCCESS"}, Orcpt: "Bob@Example.COM", OrcptAs: "RFC822"}, false,
			"RCPT TO:<Bob@Example.COM> NOTIFY=SUCCESS ORCPT=RFC822;Bob@Example.COM"},
		{"several conditions", "b@y.example", RcptParams{Notify: []string{"SUCCESS", "FAILURE", "DELAY"}}, false,
			"RCPT TO:<b@y.example> NOTIFY=SUCCESS,FAILURE,DELAY"},
		{"never", "b@y.example", RcptParams{Notify: []string{"NEVER"}}, false, "RCPT TO:<b@y.example> NOTIFY=NEVER"},
		{"ORCPT is of RFC 822 where it is not said", "b@y.example", RcptParams{Orcpt: "a+b=c@x"}, false,
			"RCPT TO:<b@y.example> ORCPT=RFC822;a+2Bb+3Dc@x"},
		{"ORCPT is xtext: nothing gets out", "b@y.example", RcptParams{Orcpt: "a b\r\nDATA\x00"}, false,
			"RCPT TO:<b@y.example> ORCPT=RFC822;a+20b+0D+0ADATA+00"},
		{"UTF-8 in a transaction of SMTPUTF8 (RFC 6533, 3)", "b@y.example",
			RcptParams{Orcpt: `é+=\ 漢@x`, OrcptAs: "UTF-8"}, true,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;é\x{2B}\x{3D}\x{5C}\x{20}漢@x`},
		{"UTF-8 in another (RFC 6533, 3)", "b@y.example",
			RcptParams{Orcpt: "é+=\\ 漢😀@x", OrcptAs: "UTF-8"}, false,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{E9}\x{2B}\x{3D}\x{5C}\x{20}\x{6F22}\x{1F600}@x`},
		{"nothing gets out of UTF-8", "b@y.example",
			RcptParams{Orcpt: "\x00\t\r\n\x7f", OrcptAs: "UTF-8"}, true,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{00}\x{09}\x{0D}\x{0A}\x{7F}`},
		{"nor of UTF-8 as ASCII", "b@y.example",
			RcptParams{Orcpt: "\x00\t\r\n\x7f", OrcptAs: "UTF-8"}, false,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{00}\x{09}\x{0D}\x{0A}\x{7F}`},
		{"RRVS in UTC (RFC 7293, 3)", "b@y.example",
			RcptParams{Since: time.Date(2014, 4, 4, 1, 1, 0, 0, time.FixedZone("", 2*60*60))}, false,
			"RCPT TO:<b@y.example> RRVS=2014-04-03T23:01:00Z"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := string(AppendRcpt([]byte("RSET\r\n"), tt.to, &tt.opts, tt.utf8))
			if got != "RSET\r\n"+tt.want+"\r\n" {
				t.Errorf("got %q, want %q after RSET", got, tt.want)
			}
		})
	}
}

func TestCommandsAreWrittenWithoutAllocation(t *testing.T) {
	line := make([]byte, 0, 1024)
	mail := &MailParams{Body: "8BITMIME", Size: 1 << 20, EnvelopeID: strings.Repeat("e=", 50), UTF8: true}
	rcpt := &RcptParams{Orcpt: "ä@x.example", OrcptAs: "UTF-8",
		Since: time.Unix(1700000000, 0)}
	if n := testing.AllocsPerRun(100, func() {
		line = AppendMail(line[:0], "a@x.example", mail)
		line = AppendRcpt(line, "b@y.example", rcpt, true)
		line = AppendRcpt(line, "b@y.example", rcpt, false)
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}
