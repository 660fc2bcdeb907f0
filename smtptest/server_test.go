package smtptest

import (
	"bytes"
	"crypto/sha256"
	"strings"
	"testing"
)

func TestDialogueLooksLikeSendGrid(t *testing.T) {
	s := start(t, NewUnstartedServer())
	r := dial(t, s)
	r.want("220 SG ESMTP service ready at smtp.test")
	r.say("EHLO client.test")
	r.want("250-smtp.test\n250-8BITMIME\n250-PIPELINING\n250-SIZE 31457280\n250 STARTTLS")
	r.say("STARTTLS")
	r.want("220 Begin TLS negotiation now")
	r.tls(clientTLS(s))
	r.say("EHLO client.test")
	r.want("250-smtp.test\n250-8BITMIME\n250-PIPELINING\n250-SIZE 31457280\n250-AUTH PLAIN LOGIN\n250 AUTH=PLAIN LOGIN")
	r.say("AUTH PLAIN " + plain(s))
	r.want("235 Authentication successful")
	r.say("MAIL FROM:<a@x.example> BODY=8BITMIME SIZE=100", "RCPT TO:<b@y.example>", `RCPT TO:<"c d>"@y.example>`, "DATA")
	r.want("250 Sender address accepted", "250 Recipient address accepted", "250 Recipient address accepted", "354 Continue")
	r.say("Subject: hi", "", "..dot", "text", ".")
	final, err := r.reply()
	if err != nil {
		t.Fatal(err)
	}
	id, ok := strings.CutPrefix(final, "250 Ok: queued as ")
	if !ok || len(id) != 22 {
		t.Fatalf("final reply %q", final)
	}
	r.say("QUIT")
	r.want("221 See you later")
	r.closed()

	ms := s.Messages()
	if len(ms) != 1 {
		t.Fatalf("%d messages", len(ms))
	}
	m := ms[0]
	body := "Subject: hi\r\n\r\n.dot\r\ntext\r\n"
	if string(m.Body) != body || m.Size != int64(len(body)) || m.SHA256 != sha256.Sum256([]byte(body)) {
		t.Errorf("body %q, %d octets", m.Body, m.Size)
	}
	if m.ID != id || m.From != "a@x.example" || len(m.To) != 2 || m.To[1] != `"c d>"@y.example` || m.MailOptions.Size != 100 || len(m.RcptOptions) != 2 || m.Conn != 1 || m.Nth != 1 {
		t.Errorf("message %+v", m)
	}
	st := s.Conns()[0]
	if !st.TLS || !st.Authenticated || st.Open || st.Mails != 1 || st.Accepted != 1 || st.Auths != 1 || st.Commands["EHLO"] != 2 || st.Commands["RCPT"] != 2 {
		t.Errorf("stats %+v", st)
	}
	if s.Stats().Open != 0 || s.Stats().MaxOpen != 1 {
		t.Errorf("open %d, at most %d", s.Stats().Open, s.Stats().MaxOpen)
	}
}

func TestBodyArrivesAsItWasSent(t *testing.T) {
	long := strings.Repeat("x", 3*readBuffer)
	tests := []struct{ why, sent, want string }{
		{"an empty message is a lone dot", ".\r\n", ""},
		{"dots are unstuffed at the beginning of lines only", "..a\r\nb..\r\n...\r\n.\r\n", ".a\r\nb..\r\n..\r\n"},
		{"a bare LF ends no line", "a\n.\r\n\n.\nb\r\n.\r\n", "a\n.\r\n\n.\nb\r\n"},
		{"a bare CR ends no line", "a\r.\r\nb\r\n.\r\n", "a\r.\r\nb\r\n"},
		{"a line longer than the buffer", long + "\r\n." + long + "\r\n.\r\n", long + "\r\n" + long + "\r\n"},
		{"a CR that is the buffer's last octet", long[:readBuffer-1] + "\r\n.\r\n", long[:readBuffer-1] + "\r\n"},
		{"a full buffer that ends before LF", long[:2*readBuffer-1] + "\r\n..\r\n.\r\n", long[:2*readBuffer-1] + "\r\n.\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := start(t, plainRelay())
			r := open(t, s)
			r.say("MAIL FROM:<>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			if _, err := r.Write([]byte(tt.sent)); err != nil {
				t.Fatal(err)
			}
			r.want("250 ")
			if got := s.Messages()[0].Body; !bytes.Equal(got, []byte(tt.want)) {
				t.Errorf("got %.100q, want %.100q", got, tt.want)
			}
			r.say("QUIT")
			r.want("221 ")
			r.closed()
		})
	}
}
