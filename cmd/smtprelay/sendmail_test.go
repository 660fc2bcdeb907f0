// The program in the place of an MTA: options, what is added to a message, and the exit statuses of sysexits.h; and usage of the
// program as a whole.
package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/smtptest"
)

func TestSendmailTakesTheOptionsOfAnMTA(t *testing.T) {
	const full = "From: Shop <shop@example.com>\nTo: ann@example.org\nBcc: eve@example.org\nDate: Mon, 1 Jan 2024 00:00:00 +0000\nMessage-ID: <1@example.com>\nSubject: x\n\none\n.\ntwo\n"
	for name, c := range map[string]struct {
		args  string
		stdin string
		want  string // sender>recipients
		body  string // its end
	}{
		"-t":               {"sendmail -t -i", full, "shop@example.com>ann@example.org,eve@example.org", "one\r\n.\r\ntwo\r\n"},
		"-ti in one":       {"sendmail -ti", full, "shop@example.com>ann@example.org,eve@example.org", "two\r\n"},
		"-oi":              {"sendmail -oi -t", full, "shop@example.com>ann@example.org,eve@example.org", "two\r\n"},
		"a dot ends":       {"sendmail -t", full, "shop@example.com>ann@example.org,eve@example.org", "one\r\n"},
		"-t and names":     {"sendmail -t dan@example.org", full, "shop@example.com>ann@example.org,eve@example.org,dan@example.org", "one\r\n"},
		"names":            {"sendmail dan@example.org bob@example.org", full, "shop@example.com>dan@example.org,bob@example.org", "one\r\n"},
		"-f":               {"sendmail -f bounce@example.com -t", full, "bounce@example.com>ann@example.org,eve@example.org", "one\r\n"},
		"-f with no space": {"sendmail -fbounce@example.com -odb -oem -bm -- dan@example.org", full, "bounce@example.com>dan@example.org", "one\r\n"},
		"-r":               {"sendmail -r bounce@example.com dan@example.org", full, "bounce@example.com>dan@example.org", "one\r\n"},
		"null sender":      {"sendmail -f <> dan@example.org", full, ">dan@example.org", "one\r\n"},
		"as a subcommand":  {"smtprelay sendmail -i -t", full, "shop@example.com>ann@example.org,eve@example.org", "two\r\n"},
		"by a path":        {"/usr/sbin/sendmail -i -t", full, "shop@example.com>ann@example.org,eve@example.org", "two\r\n"},
		"an mbox's line":   {"sendmail -i -t", "From shop Mon Jan  1 00:00:00 2024\n" + full, "shop@example.com>ann@example.org,eve@example.org", "two\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			relay := relayFor(t)
			code, out, errs := command(t, c.stdin, strings.Fields(c.args)...)
			if code != 0 || out+errs != "" || len(relay.Messages()) != 1 {
				t.Fatalf("exit status %d, %d messages: %s%s", code, len(relay.Messages()), out, errs)
			}
			m := relay.Messages()[0]
			if got := m.From + ">" + strings.Join(m.To, ","); got != c.want {
				t.Errorf("envelope %s, want %s", got, c.want)
			}
			if body := string(m.Body); !strings.HasSuffix(body, "\r\n"+c.body) || strings.Contains(body, "eve") || strings.Count(body, "Date:") != 1 || strings.Count(body, "Message-ID:") != 1 {
				t.Errorf("body %q", body)
			}
		})
	}
}

func TestSendmailAddsWhatAMessageMustHave(t *testing.T) {
	relay := relayFor(t)
	if code, _, errs := command(t, "just text\n", "sendmail", "-F", "The Cron", "-f", "cron@example.com", "ann@example.org"); code != 0 {
		t.Fatal(code, errs)
	}
	want := regexp.MustCompile(`^From: "The Cron" <cron@example\.com>\r\nDate: \w{3}, \d\d \w{3} \d{4} [\d:]{8} [-+]\d{4}\r\nMessage-ID: <\w{26}@example\.com>\r\n\r\njust text\r\n$`)
	if got := string(relay.Messages()[0].Body); !want.MatchString(got) {
		t.Errorf("%q", got)
	}
	if code, _, errs := command(t, "Subject: x\nFrom: boss@example.com\n\nhello\n", "sendmail", "ann@example.org"); code != 0 {
		t.Fatal(code, errs)
	}
	got := string(relay.Messages()[1].Body)
	if strings.Count(got, "From:") != 1 || !strings.Contains(got, "Date: ") || relay.Messages()[1].From != "boss@example.com" {
		t.Errorf("%q from %s", got, relay.Messages()[1].From)
	}
}

func TestSendmailEndsWithTheStatusesOfSysexits(t *testing.T) {
	for name, c := range map[string]struct {
		args, stdin string
		fault       smtptest.Fault
		url         string
		exit        int
		says        string
	}{
		"accepted":             {exit: 0},
		"no recipients":        {args: "sendmail -i", exit: 64},
		"unknown option":       {args: "sendmail -Z x@example.org", exit: 64},
		"daemon":               {args: "sendmail -bs", exit: 64},
		"sender is none":       {args: "sendmail -f nobody ann@example.org", exit: 64},
		"recipient is none":    {args: "sendmail nobody", exit: 67, says: "a local name such as root has no mailbox here"},
		"local name in -t":     {args: "sendmail -t", stdin: "To: root\nSubject: x\n\nx\n", exit: 65, says: "a local name such as root has no mailbox here"},
		"as cron calls it":     {args: "sendmail -FCronDaemon -i -B8BITMIME -oem ann@example.org", exit: 0},
		"options of all MTAs":  {args: "sendmail -i -N never -R hdrs -V x -G -n -L tag -O a=b -X log ann@example.org", exit: 0},
		"no recipient in -t":   {args: "sendmail -t", stdin: "Subject: x\n\nx\n", exit: 65, says: "there is no recipient: name them"},
		"recipient refused":    {fault: smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}, exit: 67},
		"message refused":      {fault: smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 spam"}, exit: 65},
		"for now":              {fault: smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 later"}, exit: 75},
		"login refused":        {fault: smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 no"}, exit: 77},
		"unknown":              {fault: smtptest.Fault{At: smtptest.Accepted, Drop: true}, exit: 69},
		"nothing listens":      {url: "smtp+insecure://127.0.0.1:" + unusedPort(t), exit: 75},
		"wrong URL":            {url: "http://example.com", exit: 78},
		"a file of its own":    {url: "-", exit: 78},
		"the header is no end": {stdin: "no: header\nat all\n", exit: 65},
	} {
		t.Run(name, func(t *testing.T) {
			relay := relayFor(t)
			if c.fault.At != 0 {
				relay.Fault(c.fault)
			}
			t.Setenv("SMTPRELAY_ENV", write(t, filepath.Join(t.TempDir(), "env"), "# no relay\n"))
			if c.url != "" {
				t.Setenv("SMTP_URL", strings.TrimPrefix(c.url, "-"))
			}
			if c.args == "" {
				c.args = "sendmail -i ann@example.org"
			}
			if c.stdin == "" {
				c.stdin = eml("ann@example.org", "x")
			}
			code, _, errs := command(t, c.stdin, strings.Fields(c.args)...)
			if code != c.exit || (code != 0) != strings.HasPrefix(errs, "sendmail: ") || !strings.Contains(errs, c.says) || strings.Contains(errs, "--") {
				t.Errorf("exit status %d, want %d: %s", code, c.exit, errs)
			}
		})
	}
}

func TestSendmailReadsItsOwnFileAndNotThatOfTheCurrentFolder(t *testing.T) {
	relay := smtptest.New(t)
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("SMTP_URL", "")
	write(t, ".env", "SMTP_URL='"+relay.URL()+"'\n")
	t.Setenv("SMTPRELAY_ENV", write(t, "mine", "# nothing\n"))
	if code, _, _ := command(t, eml("ann@example.org", "x"), "sendmail", "-t"); code != 78 || len(relay.Messages()) != 0 {
		t.Errorf("exit status %d: .env of the current folder was read", code)
	}
	write(t, "mine", "SMTP_URL='"+relay.URL()+"'\n")
	if code, _, errs := command(t, eml("ann@example.org", "x"), "sendmail", "-t"); code != 0 || len(relay.Messages()) != 1 {
		t.Error(code, errs)
	}
}

func TestUsageErrorsEndWith2AndSayWhat(t *testing.T) {
	for args, want := range map[string]string{
		"smtprelay nonsense":              "unknown command",
		"smtprelay outbox nonsense":       `unknown command "nonsense" for "smtprelay outbox"`,
		"smtprelay outbox resolve one":    "usage: smtprelay outbox resolve ID",
		"smtprelay serve 8025":            `serve takes flags only, and no "8025"`,
		"smtprelay man":                   "usage: smtprelay man FOLDER",
		"smtprelay send":                  "nothing to send: name files, mailboxes or folders",
		"smtprelay send --nonsense x":     "unknown flag",
		"smtprelay check --from a@b.test": "--from and --to belong together",
		"smtprelay check --send":          "--send needs them",
		"smtprelay send - x":              `"-" is the last`,
		"smtprelay send --to nobody -":    `--to: addresses "nobody"`,
		"smtprelay send --from nobody -":  `--from: addresses "nobody"`,
		"smtprelay send --rate -3 -":      "--rate: want messages a second",
	} {
		code, out, errs := command(t, "", strings.Fields(args)...)
		if code != exitUsage || out != "" || !strings.HasPrefix(errs, "smtprelay: ") || !strings.Contains(errs, want) {
			t.Errorf("%s: exit status %d: %s%s", args, code, out, errs)
		}
	}
}

func TestManualPagesAndCompletionAreMadeOfTheSameCommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1") // made by the command
	if code, _, errs := command(t, "", "smtprelay", "man", dir); code != 0 {
		t.Fatal(errs)
	}
	page, err := os.ReadFile(filepath.Join(dir, "smtprelay-send.1"))
	if err != nil || !strings.Contains(string(page), "resend-unknown") {
		t.Error(err, string(page))
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, _ := command(t, "", "smtprelay", "completion", shell); code != 0 || !strings.Contains(out, "smtprelay") {
			t.Errorf("%s: exit status %d", shell, code)
		}
	}
}
