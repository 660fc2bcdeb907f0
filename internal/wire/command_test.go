package wire

import (
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
)

func TestMailIsWrittenWithItsParameters(t *testing.T) {
	text := func(s string) *string { return &s }
	for _, tt := range []struct {
		why, from string
		opts      smtp.MailOptions
		want      string
	}{
		{"the path alone", "a@x.example", smtp.MailOptions{}, "MAIL FROM:<a@x.example>"},
		{"the null reverse-path (RFC 5321, 4.5.5)", "", smtp.MailOptions{}, "MAIL FROM:<>"},
		{"a quoted part before @ as it is", `"a b"@x.example`, smtp.MailOptions{}, `MAIL FROM:<"a b"@x.example>`},
		{"8BITMIME (RFC 6152)", "a@x.example", smtp.MailOptions{Body: smtp.Body8BitMIME}, "MAIL FROM:<a@x.example> BODY=8BITMIME"},
		{"SIZE (RFC 1870, 6)", "a@x.example", smtp.MailOptions{Size: 500000}, "MAIL FROM:<a@x.example> SIZE=500000"},
		{"SMTPUTF8 (RFC 6531, 3.4)", "é@x.example", smtp.MailOptions{UTF8: true}, "MAIL FROM:<é@x.example> SMTPUTF8"},
		{"REQUIRETLS (RFC 8689, 2)", "a@x.example", smtp.MailOptions{RequireTLS: true}, "MAIL FROM:<a@x.example> REQUIRETLS"},
		{"the example of RFC 3461, 10.2", "Alice@Example.ORG", smtp.MailOptions{Return: smtp.DSNReturnHeaders, EnvelopeID: "QQ314159"},
			"MAIL FROM:<Alice@Example.ORG> RET=HDRS ENVID=QQ314159"},
		{"ENVID is xtext (RFC 3461, 4)", "a@x.example", smtp.MailOptions{EnvelopeID: "a+b=c d~é\x7f"},
			"MAIL FROM:<a@x.example> ENVID=a+2Bb+3Dc+20d~+C3+A9+7F"},
		{"nothing gets out of ENVID", "a@x.example", smtp.MailOptions{EnvelopeID: "x\r\nRCPT TO:<b@y.example>\x00"},
			"MAIL FROM:<a@x.example> ENVID=x+0D+0ARCPT+20TO:<b@y.example>+00"},
		{"the example of RFC 4954, 5", "e=mc2@example.com", smtp.MailOptions{Auth: text("e=mc2@example.com")},
			"MAIL FROM:<e=mc2@example.com> AUTH=e+3Dmc2@example.com"},
		{"an unknown submitter (RFC 4954, 5)", "a@x.example", smtp.MailOptions{Auth: text("")}, "MAIL FROM:<a@x.example> AUTH=<>"},
		{"nothing gets out of AUTH", "a@x.example", smtp.MailOptions{Auth: text("x\n ")}, "MAIL FROM:<a@x.example> AUTH=x+0A+20"},
		{"all of them", "a@x.example",
			smtp.MailOptions{Body: smtp.Body7Bit, Size: 1, UTF8: true, Return: smtp.DSNReturnFull, EnvelopeID: "e", RequireTLS: true, Auth: text("")},
			"MAIL FROM:<a@x.example> BODY=7BIT SIZE=1 SMTPUTF8 RET=FULL ENVID=e REQUIRETLS AUTH=<>"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			if got := string(AppendMail([]byte("RSET\r\n"), tt.from, &tt.opts, nil)); got != "RSET\r\n"+tt.want+"\r\n" {
				t.Errorf("got %q, want %q behind RSET", got, tt.want)
			}
		})
	}
}

// go-smtp keeps them with the recipients, and writes them there; the RFCs have them behind MAIL.
func TestUrgencyIsAParameterOfMail(t *testing.T) {
	priority := func(n int) *int { return &n }
	for _, tt := range []struct {
		why  string
		opts smtp.RcptOptions
		want string
	}{
		{"BY, or a notice (RFC 2852, 4)", smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Time: -2 * time.Minute, Mode: smtp.DeliverByNotify}}, " BY=-120;N"},
		{"BY, or return, with a trace", smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Time: time.Hour, Mode: smtp.DeliverByReturn, Trace: true}}, " BY=3600;RT"},
		{"a priority (RFC 6710, 3)", smtp.RcptOptions{MTPriority: priority(-9)}, " MT-PRIORITY=-9"},
		{"priority 0 is one too", smtp.RcptOptions{MTPriority: priority(0)}, " MT-PRIORITY=0"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := string(AppendMail(nil, "a@x.example", &smtp.MailOptions{Size: 1}, &tt.opts))
			if want := "MAIL FROM:<a@x.example> SIZE=1" + tt.want + "\r\n"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if got := string(AppendRcpt(nil, "b@y.example", &tt.opts, false)); got != "RCPT TO:<b@y.example>\r\n" {
				t.Errorf("got %q, with what is none of RCPT", got)
			}
		})
	}
}

func TestRcptIsWrittenWithItsParameters(t *testing.T) {
	for _, tt := range []struct {
		why, to string
		opts    *smtp.RcptOptions
		utf8    bool
		want    string
	}{
		{"the path alone", "b@y.example", nil, false, "RCPT TO:<b@y.example>"},
		{"options that set nothing", "b@y.example", &smtp.RcptOptions{}, true, "RCPT TO:<b@y.example>"},
		{"the first example of RFC 3461, 10.2", "Bob@Example.COM",
			&smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifySuccess}, OriginalRecipient: "Bob@Example.COM", OriginalRecipientType: smtp.DSNAddressTypeRFC822}, false,
			"RCPT TO:<Bob@Example.COM> NOTIFY=SUCCESS ORCPT=RFC822;Bob@Example.COM"},
		{"several conditions", "b@y.example", &smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifySuccess, smtp.DSNNotifyFailure, smtp.DSNNotifyDelayed}}, false,
			"RCPT TO:<b@y.example> NOTIFY=SUCCESS,FAILURE,DELAY"},
		{"never", "b@y.example", &smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifyNever}}, false, "RCPT TO:<b@y.example> NOTIFY=NEVER"},
		{"ORCPT is of RFC 822 where it is not said", "b@y.example", &smtp.RcptOptions{OriginalRecipient: "a+b=c@x"}, false,
			"RCPT TO:<b@y.example> ORCPT=RFC822;a+2Bb+3Dc@x"},
		{"ORCPT is xtext: nothing gets out", "b@y.example", &smtp.RcptOptions{OriginalRecipient: "a b\r\nDATA\x00"}, false,
			"RCPT TO:<b@y.example> ORCPT=RFC822;a+20b+0D+0ADATA+00"},
		{"UTF-8 in a transaction of SMTPUTF8 (RFC 6533, 3)", "b@y.example",
			&smtp.RcptOptions{OriginalRecipient: `é+=\ 漢@x`, OriginalRecipientType: smtp.DSNAddressTypeUTF8}, true,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;é\x{2B}\x{3D}\x{5C}\x{20}漢@x`},
		{"UTF-8 in another (RFC 6533, 3)", "b@y.example",
			&smtp.RcptOptions{OriginalRecipient: "é+=\\ 漢😀@x", OriginalRecipientType: smtp.DSNAddressTypeUTF8}, false,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{E9}\x{2B}\x{3D}\x{5C}\x{20}\x{6F22}\x{1F600}@x`},
		{"nothing gets out of UTF-8", "b@y.example",
			&smtp.RcptOptions{OriginalRecipient: "\x00\t\r\n\x7f", OriginalRecipientType: smtp.DSNAddressTypeUTF8}, true,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{00}\x{09}\x{0D}\x{0A}\x{7F}`},
		{"nor of UTF-8 as ASCII", "b@y.example",
			&smtp.RcptOptions{OriginalRecipient: "\x00\t\r\n\x7f", OriginalRecipientType: smtp.DSNAddressTypeUTF8}, false,
			`RCPT TO:<b@y.example> ORCPT=UTF-8;\x{00}\x{09}\x{0D}\x{0A}\x{7F}`},
		{"RRVS in UTC (RFC 7293, 3)", "b@y.example",
			&smtp.RcptOptions{RequireRecipientValidSince: time.Date(2014, 4, 4, 1, 1, 0, 0, time.FixedZone("", 2*60*60))}, false,
			"RCPT TO:<b@y.example> RRVS=2014-04-03T23:01:00Z"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := string(AppendRcpt([]byte("RSET\r\n"), tt.to, tt.opts, tt.utf8))
			if got != "RSET\r\n"+tt.want+"\r\n" {
				t.Errorf("got %q, want %q behind RSET", got, tt.want)
			}
		})
	}
}

func TestCommandsAreWrittenWithoutAllocation(t *testing.T) {
	line := make([]byte, 0, 1024)
	mail := &smtp.MailOptions{Body: smtp.Body8BitMIME, Size: 1 << 20, EnvelopeID: strings.Repeat("e=", 50), UTF8: true}
	rcpt := &smtp.RcptOptions{OriginalRecipient: "ä@x.example", OriginalRecipientType: smtp.DSNAddressTypeUTF8,
		RequireRecipientValidSince: time.Unix(1700000000, 0)}
	if n := testing.AllocsPerRun(100, func() {
		line = AppendMail(line[:0], "a@x.example", mail, rcpt)
		line = AppendRcpt(line, "b@y.example", rcpt, true)
		line = AppendRcpt(line, "b@y.example", rcpt, false)
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}
