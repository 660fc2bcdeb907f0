package main

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

// postfixRecord encodes as src/global/record.c does.
func postfixRecord(kind byte, text string) string {
	out := string(kind)
	n := len(text)
	for n >= 0x80 {
		out += string([]byte{byte(n&0x7f) | 0x80})
		n >>= 7
	}
	return out + string([]byte{byte(n)}) + text
}

func TestPostfixQueueFileIsRead(t *testing.T) {
	long := make([]byte, 2048)
	for i := range long {
		long[i] = 'x'
	}
	file := postfixRecord('C', "             384             211") + postfixRecord('T', "1795528000") +
		postfixRecord('S', "shop@client.example") + postfixRecord('O', "ann@relay.example") +
		postfixRecord('R', "ann@relay.example") + postfixRecord('R', "bob@relay.example") + postfixRecord('M', "") +
		postfixRecord('N', "Subject: x") + postfixRecord('N', "") + postfixRecord('L', string(long)) + postfixRecord('N', "y") +
		postfixRecord('N', ".dot") + postfixRecord('X', "") + postfixRecord('R', "kept@relay.example")
	if _, err := parsePostfix([]byte(file)); err == nil {
		t.Error("a file without its end was accepted")
	}
	if _, err := parsePostfix([]byte(file[:len(file)-3])); err == nil {
		t.Error("a file that is cut in a record was accepted")
	}
	got, err := parsePostfix([]byte(file + postfixRecord('E', "")))
	if err != nil {
		t.Fatal(err)
	}
	want := entry{
		from: "shop@client.example",
		to:   []string{"ann@relay.example", "bob@relay.example", "kept@relay.example"},
		data: []byte("Subject: x\n\n" + string(long) + "y\n.dot\n"),
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestEximSpoolFilesAreRead(t *testing.T) {
	header := "1xVqox-000006-0R-H\nroot 0 0\n<ann@client.example>\n1795528071 0\n-helo_name localhost\nXX\n2\nbob@relay.example\nx@relay.example\n\n" +
		"010P Received:\n" + "011  Subject: x\n" + "005* Bcc:\n"
	got, err := parseExim([]byte(header), []byte("1xVqox-000006-0R-D\nhello\n.dot\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := entry{
		from: "ann@client.example",
		to:   []string{"bob@relay.example", "x@relay.example"},
		data: []byte("Received:\nSubject: x\n\nhello\n.dot\n"),
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := parseExim([]byte(header[:len(header)-4]), []byte("1xVqox-000006-0R-D\n")); err == nil {
		t.Error("a truncated header was accepted")
	}
}

func TestOpenSMTPDQueueIsRead(t *testing.T) {
	root := t.TempDir()
	folder := filepath.Join(root, "var/spool/smtpd/queue/89/8919a3d2")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"message":          "Subject: x\n\nhello\n",
		"8919a3d2559ed5ed": "version: 3\ntype: mta\nsender: @\nrcpt: bob@relay.example\ndest: bob@relay.example\n",
		"8919a3d2818e01cc": "version: 3\ntype: mta\nsender: @\nrcpt: ann@relay.example\ndest: ann@relay.example\n",
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := opensmtpdQueue(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{{id: "8919a3d2", to: []string{"bob@relay.example", "ann@relay.example"}, data: []byte("Subject: x\n\nhello\n")}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRecordBeingWrittenIsNotRead(t *testing.T) {
	root := t.TempDir()
	if got, err := recorded(root); err != nil || got != nil {
		t.Errorf("without a file: got %v, %v", got, err)
	}
	path := filepath.Join(root, recordFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	text := `{"id":"7","from":"","to":["bob@relay.example"],"data":"YQ0KYg0K"}` + "\n" + `{"from":"a@b`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := recorded(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{{id: "7", to: []string{"bob@relay.example"}, data: []byte("a\nb\n")}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
